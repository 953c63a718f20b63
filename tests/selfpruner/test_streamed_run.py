"""A streamed run, end to end, beside the same run in memory: the same files, bit for bit."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pruning import loading
from selfpruner import finishing, pipeline, verdict
from selfpruner.config import RunConfig, load_config
from selfpruner.progress import Progress
from selfpruner.resident import opened_arena
from selfpruner.results import Refit, Results
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.workbench import lent_ranking, prepare
from selfpruner.workforce import Workforce

COMMON = ("evaluation.tasks=[]", "evaluation.speed.repeats=1", "evaluation.speed.new_tokens=1")
LITTLE = 45_000  # bytes: too few for all layers of the tiny model


def _config(tiny_run: Path, memory: str, *settings: str) -> RunConfig:
    return load_config(tiny_run, settings=[*COMMON, *settings, f"memory={memory}"])


def _run(config: RunConfig, path: Path) -> RunFolder:
    folder = RunFolder.create(path, config)
    with Progress() as progress:
        pipeline.compress(config, folder, progress)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@contextmanager
def _little_room() -> Iterator[None]:
    """Leave the judges too little memory for all layers of the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_free", lambda _: {"cpu": LITTLE})
        yield


def _scores(folder: RunFolder) -> list[Any]:
    rows = map(json.loads, folder.candidates.read_text().splitlines())
    return [(x["id"], x["key"], x["scores"]) for x in rows]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def folders(
    tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[RunFolder, RunFolder]:
    """Return the folders of the run in memory and of the streamed one."""
    path = tmp_path_factory.mktemp("runs")
    settings = [f"dtype={request.param}", "fitness={kl: 1.0, perplexity: 0.5}"]
    settings += ["evaluation.tasks=[arc_easy, boolq]", "evaluation.samples=6"]
    settings += ["search.allocator=descent", "search.slopes=2", "search.evaluations=12"]
    whole = _run(_config(tiny_run, "whole", *settings), path / "whole")
    with _little_room():
        streamed = _run(_config(tiny_run, "streamed", *settings), path / "streamed")
    return whole, streamed


def test_search_and_ranking_are_the_same(folders: tuple[RunFolder, RunFolder]) -> None:
    whole, streamed = folders
    assert len(_scores(whole)) >= 5
    assert (whole / "slopes.jsonl").read_text().count("\n") == 2  # before it and after the first
    assert _scores(whole) == _scores(streamed)
    names = ("plan.json", "statistics/errors.json", "statistics/order.json", "slopes.jsonl")
    for name in names:
        assert (whole / name).read_bytes() == (streamed / name).read_bytes()


def test_the_exported_models_are_the_same(folders: tuple[RunFolder, RunFolder]) -> None:
    one, other = (_tensors(folder.model) for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {x.dtype for x in other.values()} == {torch.bfloat16}
    for name in ("config.json", "modeling_pruned.py", "tokenizer.json"):
        assert (folders[0].model / name).read_bytes() == (folders[1].model / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folders[1].model, trust_remote_code=True)
    assert (
        sum(x.numel() for x in model.parameters()) == _results(folders[1]).model.parameters_pruned
    )


def test_the_reports_say_the_same(folders: tuple[RunFolder, RunFolder]) -> None:
    one, other = (_results(folder) for folder in folders)
    assert one.quality == other.quality
    assert other.quality.pruned.tasks.keys() == {"arc_easy", "boolq"}
    assert other.quality.difference is not None
    assert (one.model, one.memory, one.refit, one.controls) == (
        other.model,
        other.memory,
        other.refit,
        other.controls,
    )
    assert other.controls.keys() == {"uniform", "uniform_mlp"}
    assert other.refit is not None
    assert one.environment == other.environment
    assert other.environment["device"] == "cpu"
    assert not other.speed.rows
    assert not other.samples
    assert folders[1].report.is_file()


def test_bytes_of_weights_are_what_pruning_alone_saves(
    folders: tuple[RunFolder, RunFolder],
) -> None:
    """Whatever dtype a run computes in, it exports bfloat16: both models are counted in that."""
    for found in map(_results, folders):
        assert found.memory.dense_bytes == 2 * found.model.parameters_dense
        assert found.memory.pruned_bytes == 2 * found.model.parameters_pruned


def test_nothing_is_left_of_the_scratch_folder(folders: tuple[RunFolder, RunFolder]) -> None:
    assert not folders[1].scratch.exists()


def test_tasks_open_one_model_after_the_other_when_all_else_is_gone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[transformers.PreTrainedModel]] = []
    layers: list[str] = []
    judged: list[transformers.PreTrainedModel] = []

    def free(_: str) -> dict[int | str, int]:
        found = real_free("cpu")
        assert not [model for model in opened if model() is not None]
        assert judged
        assert all(x.is_meta for model in judged for x in model.parameters())
        assert not (tmp_path / "run" / "scratch").exists()
        return dict.fromkeys(found, LITTLE)

    def load_spread(*args: Any, **options: Any) -> Any:
        model, tokenizer = loading.load_spread(*args, **options)
        opened.append(weakref.ref(model))
        layers.append(loading.whereabouts(model))
        return model, tokenizer

    def judging(bench: Any, pruned: Any, *args: Any) -> Results:
        judged.extend([bench.model, pruned])
        return verdict.verdict(bench, pruned, *args)

    real_free = loading._free
    monkeypatch.setattr(loading, "_free", free)
    monkeypatch.setattr(verdict, "load_spread", load_spread)
    monkeypatch.setattr(pipeline, "verdict", judging)
    tasks = ("evaluation.tasks=[boolq]", "evaluation.samples=2", "pruning.refit=false")
    folder = _run(_config(tiny_run, "streamed", *tasks), tmp_path / "run")
    assert _results(folder).quality.dense.tasks["boolq"].n == 2
    assert len(layers) == 2
    assert all(" on disk" in x for x in layers)


def test_a_refit_that_does_not_help_costs_no_second_slicing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sliced: list[str] = []

    def noted(elastic: Any, plan: Any, folder: Path) -> Any:
        sliced.append(folder.name)
        return original(elastic, plan, folder)

    original = finishing.sliced_on_disk
    monkeypatch.setattr(finishing, "sliced_on_disk", noted)
    monkeypatch.setattr(finishing, "_judged", lambda a, b: Refit(kept=False, before=a, after=b))
    found = _results(_run(_config(tiny_run, "streamed"), tmp_path / "run"))
    assert found.refit is not None
    assert not found.refit.kept
    assert sorted(sliced) == sorted({*found.controls, "found"})


def test_workers_score_from_the_cuts_of_the_run(tiny_run: Path, tmp_path: Path) -> None:
    """Two processes read what one has ranked; they rank nothing, and change no number."""
    config = _config(tiny_run, "streamed", "search.population=6")
    plans, scores, files = [], [], []
    for size in (1, 2):
        folder = RunFolder.create(tmp_path / str(size), config)
        bench = prepare(config, progress := Progress(StringIO()), folder)
        workforce = Workforce(size, asked_threads=1)
        with opened_arena(bench, folder, progress, workforce) as arena:
            found = search(arena, config, folder, progress)
        plans.append(found.best.plan)
        scores.append(_scores(folder))
        files.append(sorted(x.name for x in (folder.scratch / "cuts").iterdir()))
    assert plans[0] == plans[1]
    assert scores[0] == scores[1]
    assert files[0] == files[1]


def test_a_worker_without_the_folder_of_the_run_is_told_so(tiny_run: Path, tmp_path: Path) -> None:
    config = _config(tiny_run, "streamed")
    folder = RunFolder.create(tmp_path / "run", config)
    bench = prepare(config, Progress(StringIO()), folder)
    with pytest.raises(ValueError, match=r"no .*ranking\.pt here; a streamed run's workers share"):
        lent_ranking(bench, tmp_path / "ranking.pt")


def _results(folder: RunFolder) -> Results:
    return Results.load(folder.results)


@pytest.mark.parametrize("refits", [True, False])
def test_no_model_is_ever_whole_in_memory(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refits: bool
) -> None:
    """Whoever loads or slices in memory fails; also where the refit is not kept, or off."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a whole model")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(finishing, "sliced", refuse)
    worse = finishing.Refit(kept=False, before=1.0, after=2.0)
    monkeypatch.setattr(finishing, "_judged", lambda *_: worse)
    config = _config(tiny_run, "streamed", f"pruning.refit={json.dumps(refits)}")
    folder = _run(config, tmp_path / "run")
    assert _results(folder).refit == (worse if refits else None)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("pruning.statistics=sequential", "pruning.statistics: got sequential; allowed: frozen"),
        ("pruning.calibration=auto", "pruning.calibration: got auto; allowed: all"),
        ("data.choices=4", "data.choices: got 4; allowed: 0"),
        ("search.allocator=llm", "driver.kind: got embedded; allowed: another"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    tiny_run: Path, setting: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match="memory streamed") as refusal:
        _config(tiny_run, "streamed", setting)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    _config(tiny_run, "whole", setting)
