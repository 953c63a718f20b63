"""The schema of results.json: round trip, strictness, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.ledger import Ledger, LlmLine
from selfpruner.config import CONFIGS, load_config
from selfpruner.results import NORMALISED, Difference, Results
from selfpruner.verdict import _search_numbers

SAMPLE = Path(__file__).parent / "results_sample.json"


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return data


def _refusal(tmp_path: Path, data: object) -> str:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json: ") as caught:
        Results.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip_keeps_every_value(tmp_path: Path) -> None:
    results = Results.load(SAMPLE)
    path = tmp_path / "results.json"
    results.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == _sample()
    assert Results.load(path) == results


def test_python_lists_and_whole_floats_are_accepted() -> None:
    data = _sample()
    data["search"]["wall_seconds"] = 412
    assert Results.model_validate(data).search.wall_seconds == 412.0


@pytest.mark.parametrize(
    ("allocator", "placebo", "want"),
    [("hybrid", "none", None), ("hybrid", "fitness", "fitness"), ("genetic", "fitness", None)],
)
def test_a_placebo_is_that_of_a_search_with_an_llm(
    tmp_path: Path, allocator: str, placebo: str, want: str | None
) -> None:
    settings = [f"search.allocator={allocator}", f"search.placebo={placebo}"]
    config = load_config(CONFIGS / "demo.yaml", settings=settings)
    assert _search_numbers(config, _outcome(), Ledger(tmp_path)).placebo == want


def test_the_driver_is_told_by_who_replied(tmp_path: Path) -> None:
    settings = [
        "driver={kind: api, base_url: http://host/v1, fallbacks: [{kind: embedded}]}",
        "search.allocator=hybrid",
    ]
    config, ledger = load_config(CONFIGS / "demo.yaml", settings=settings), Ledger(tmp_path)

    def driver() -> str | None:
        return _search_numbers(config, _outcome(), ledger).driver

    assert driver() == "api, then embedded: no reply"
    for slot, (model, reply) in enumerate([("gone", None), ("big", "{}"), ("own", "{}")]):
        ledger.add_line(_line(slot, model, reply))
    assert driver() == "api, then embedded: big, own"


def _line(slot: int, model: str, reply: str | None) -> LlmLine:
    return LlmLine(
        generation=0,
        slot=slot,
        operator="generate",
        attempt=0,
        call=0,
        prompt_hash="abc",
        messages=(),
        reply=reply,
        tokens=1,
        estimated=False,
        cost=0.0,
        seconds=0.1,
        model=model,
        outcome="accepted" if reply else "failed",
    )


def _outcome() -> Any:
    numbers = {**_sample()["search"], "seconds": 1.0, "lowest_fitness": 0.5}
    return SimpleNamespace(
        found=SimpleNamespace(**numbers),
        selected=SimpleNamespace(fitness=0.5),
        selection_fitness=0.6,
    )


def test_results_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Results.load(SAMPLE).recipe = "other"


def test_unknown_key_is_named_with_its_place(tmp_path: Path) -> None:
    data = _sample()
    data["search"]["temperature"] = 1.0
    message = _refusal(tmp_path, data)
    assert "search.temperature" in message
    assert "got 1.0" in message


@pytest.mark.parametrize("key", sorted(json.loads(SAMPLE.read_text(encoding="utf-8"))))
def test_every_top_level_key_is_required(tmp_path: Path, key: str) -> None:
    data = _sample()
    del data[key]
    assert f"{key}: Field required" in _refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("model", "parameters_pruned"), "102654272"),
        (("model", "parameters_pruned"), 1.5),
        (("quality", "pruned", "mean"), 45.0),
        (("history", 3, "origin"), "oracle"),
        (("speed", "rows", 0, "speedup"), 0.0),
        (("budget", "kind"), "watts"),
        (("quality", "difference", "ci95"), [1.0]),
        (("quality", "difference", "mcnemar", "boolq"), 1.5),
        (("units",), []),
    ],
)
def test_wrong_values_are_refused_where_they_stand(
    tmp_path: Path, path: tuple[Any, ...], value: object
) -> None:
    data = _sample()
    inner: Any = data
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    assert ".".join(str(part) for part in path) in _refusal(tmp_path, data)


def test_many_problems_stay_one_line(tmp_path: Path) -> None:
    assert "more)" in _refusal(tmp_path, {"schema_version": 1})


def test_missing_file_and_broken_json_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: missing; has the run finished\?"):
        Results.load(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema_version": 1,\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: the file: Invalid JSON"):
        Results.load(broken)


def test_numbers_that_json_cannot_hold_become_none_only_where_allowed() -> None:
    data = _sample()
    data["controls"]["uniform"]["perplexity"]["passages"] = float("inf")
    data["history"][5]["fitness"] = float("nan")
    results = Results.model_validate(data)
    assert results.controls["uniform"].perplexity["passages"] is None
    assert results.history[5].fitness is None
    data["speed"]["rows"][0]["speedup"] = float("inf")
    with pytest.raises(ValueError, match="speedup"):
        Results.model_validate(data)


def test_skipped_parts_may_be_none() -> None:
    data = _sample()
    data["refit"] = None
    data["quality"]["difference"] = None
    for side in ("dense", "pruned"):
        data["quality"][side].update(tasks={}, mean=None)
    data["search"].update(driver=None, strategy=None, selection_fitness=None)
    assert Results.model_validate(data).search.driver is None


def test_mean_of_the_sample_follows_its_convention() -> None:
    for model in (Results.load(SAMPLE).quality.dense, Results.load(SAMPLE).quality.pruned):
        picked = [v.acc_norm if k in NORMALISED else v.acc for k, v in model.tasks.items()]
        assert picked == [model.figure(task) for task in model.tasks]
        assert model.mean == pytest.approx(sum(x or 0.0 for x in picked) / 7, abs=5e-5)


def test_uniform_plan_is_recognised() -> None:
    data = _sample()
    assert not Results.model_validate(data).is_uniform
    data["units"] = [{**data["units"][0], "layer": i} for i in range(4)]
    assert Results.model_validate(data).is_uniform


def test_results_older_than_a_field_still_load(tmp_path: Path) -> None:
    data = _sample()
    del data["quality"]["difference"]["mcnemar"], data["search"]["selected_fitness"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    results = Results.load(path)
    assert results.quality.difference is not None
    assert results.quality.difference.mcnemar is None
    assert results.search.selected_fitness is None


@pytest.mark.parametrize(
    ("ci95", "items", "words"),
    [
        ((-8.0, -0.1), [40, 1000], "drop of 1.00 points is resolved by the 1,040 items"),
        ((-8.0, 0.0), [40, 40], "drop of 1.00 points is not resolved by the 80 items"),
        ((-1.0, 2.0), [40, 40], "drop of 1.00 points is not resolved by the 80 items"),
        ((-8.0, -0.1), [40, 9], "not resolved: 9 items of a task are too few"),
        ((-1.0, -1.0), [40, 40], "not resolved: 40 items of a task are too few"),
    ],
)
def test_a_difference_is_resolved_where_its_interval_leaves_out_zero(
    ci95: tuple[float, float], items: list[int], words: str
) -> None:
    assert words in Difference(points=-1.0, ci95=ci95).resolution(items)
