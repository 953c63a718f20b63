"""Experiments: configuration, cells that are never run twice, tables read off the courses."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.drivers.driver import DriverError
from selfpruner.cells import run_cells
from selfpruner.config import CONFIGS
from selfpruner.experiment import _goes_on, cells_of, digest_of
from selfpruner.experiment_config import load_experiment
from selfpruner.progress import Progress
from selfpruner.workers import take_device, visible_devices


def test_the_shipped_experiments_are_valid() -> None:
    files = sorted((CONFIGS / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert len(load_experiment(file).runs) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b.yaml\narms: {a: {pruning.step: 8}}", "arms.a: got pruning.step; allowed: names"),
        ("base: b.yaml\narms: {}", "arms: "),
        ("arms: {a: {}}", "base: not given"),
        ("base: b.yaml\narms: {a: {}}\nsedes: [1]", "unknown key sedes; did you mean seeds?"),
        ("base: b.yaml\narms: {a: {}}\nroles: {b: llm}", "roles: got b; allowed: a"),
        ("base: b.yaml\narms: {a: {}}\nroles: {a: oracle}", "roles.a: got 'oracle'; allowed: "),
        ("base: b.yaml\narms: {a: {}}\ncontrol: b", "control: got b; allowed: a"),
        ("base: b.yaml\narms: {a: {}}\nseeds: [1, 1]", "seeds: each may stand once"),
        ("base: b.yaml\narms: {a/b: {}}", "arms.a/b: allowed: letters, digits"),
        ("base: b.yaml\narms: {a: {}}\nbudgets: [{watts: 1}]", "unknown key budgets.0.watts"),
        (
            "base: b.yaml\nmatrix: {search.x: [p], model: [q]}",
            "arms.p-q: got model; allowed: names",
        ),
        ("base: b.yaml\narms: {a: {}}\nseeds: [-1]", "seeds: got -1; allowed: 0 and above"),
        (
            f"base: {CONFIGS}/demo.yaml\narms: {{a: {{search.alocator: cma}}}}",
            "e.yaml: arms.a: search.alocator: unknown key search.alocator; did you mean",
        ),
        ("model: m\nseed: 1", "a run's configuration, want an experiment"),
        ("base: b.yaml\narms: {p: {}}\nmatrix: {search.allocator: [p]}", "makes the arm p, which"),
    ],
)
def test_a_wrong_experiment_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"e\.yaml: ") as refusal:
        load_experiment(path)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    path, ran = tmp_path / "results" / "x.jsonl", []

    def figures(cell: dict[str, Any]) -> dict[str, Any]:
        if cell["n"] == 2 and len(ran) < 3:
            raise KeyboardInterrupt
        ran.append(cell["n"])
        return {"square": cell["n"] ** 2}

    cells = [{"n": n} for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run_cells(path, cells, figures)
    assert [json.loads(x)["cell"]["n"] for x in path.read_text().splitlines()] == [0, 1]
    ran.append(-1)
    rows = run_cells(path, cells, figures)
    assert [x["figures"]["square"] for x in rows] == [0, 1, 4, 9]
    assert ran == [0, 1, -1, 2, 3]
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 5: not JSON"):
        run_cells(path, cells, figures)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DriverError])
def test_an_experiment_that_stops_says_how_to_go_on(error: type[BaseException]) -> None:
    told = StringIO()
    with pytest.raises(error), _goes_on(Progress(told)):
        raise error
    assert "the same command goes on where it stopped" in told.getvalue()


@pytest.mark.parametrize("left", ["", '{"cell": {"n"', '{"cell": {"n": 2}, "figures": {}}'])
def test_a_torn_last_line_is_run_again(tmp_path: Path, left: str) -> None:
    """A line without its end is not known to be whole."""
    path, ran = tmp_path / "x.jsonl", []

    def figures(cell: dict[str, Any]) -> dict[str, Any]:
        ran.append(cell["n"])
        return {}

    cells = [{"n": n} for n in range(3)]
    run_cells(path, cells[:2], figures)
    whole = path.read_text()
    path.write_text(whole + left)
    assert [x["cell"]["n"] for x in run_cells(path, cells, figures)] == [0, 1, 2]
    assert ran == [0, 1, 2]
    assert path.read_text().startswith(whole)
    assert path.read_text().count("\n") == 3


def _experiment(folder: Path, **parts: Any) -> Path:
    """Return an experiment file beside a base."""
    base = {"model": "m", "driver": {"kind": "embedded"}, "data": {"choices": 0}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", **parts}))
    return path


def test_cells_are_seed_by_seed_with_all_arms_models_and_budgets(tmp_path: Path) -> None:
    path = _experiment(
        tmp_path,
        seeds=[4, 7],
        models=["a", "b"],
        budgets=[{"parameters": 0.7}, {"macs": 0.5}],
        arms={"one": {"search.allocator": "random"}},
        matrix={"search.allocator": ["genetic", "llm"], "search.population": [8, 16]},
    )
    plan = load_experiment(path)
    assert list(plan.runs) == ["one", "genetic-8", "genetic-16", "llm-8", "llm-16"]
    assert plan.runs["llm-16"].search.population == 16
    cells = cells_of(plan)
    assert len(cells) == len({json.dumps(x) for x in cells}) == 2 * 2 * 2 * 5
    assert [x["seed"] for x in cells] == [4] * 20 + [7] * 20
    assert [x["model"] for x in cells[:20]] == ["a"] * 10 + ["b"] * 10
    assert [x["budget"] for x in cells[:10]] == ["parameters=0.7"] * 5 + ["macs=0.5"] * 5
    assert [x["arm"] for x in cells[:5]] == list(plan.runs)


def test_without_models_and_budgets_those_of_the_base_serve(tmp_path: Path) -> None:
    cells = cells_of(load_experiment(_experiment(tmp_path, seeds=[0], arms={"a": {}})))
    assert [(x["model"], x["budget"]) for x in cells] == [("m", "parameters=0.7")]


def test_a_digest_knows_what_was_set_and_nothing_of_defaults(tmp_path: Path) -> None:
    arms: dict[str, Any] = {
        "plain": {},
        "default": {"search.finalists": 3},
        "other": {"search.finalists": 4},
        "worded": {"search.strategy": "paper"},
        "classical": {"search.allocator": "random"},
        "classical_worded": {"search.allocator": "random", "search.strategy": "paper"},
    }
    runs = load_experiment(_experiment(tmp_path, arms=arms)).runs
    digests = {arm: digest_of(run) for arm, run in runs.items()}
    assert digests["plain"] == digests["default"]
    assert len(set(digests.values())) == 5
    elsewhere = runs["plain"].model_copy(update={"model": "n"})
    assert digest_of(elsewhere) == digests["plain"]  # a cell names its model


def test_a_digest_outlives_a_setting_that_is_added(tmp_path: Path) -> None:
    run = load_experiment(_experiment(tmp_path, arms={"a": {}})).runs["a"]

    class Later(type(run)):  # type: ignore[misc]
        novelty: int = 3

    later = Later.model_validate(run.model_dump())
    assert digest_of(later) == digest_of(run)
    assert digest_of(later.model_copy(update={"novelty": 4})) != digest_of(run)


def test_roles_are_told_from_the_search_or_declared(tmp_path: Path) -> None:
    arms = {
        "genetic": {"search.allocator": "genetic"},
        "moves": {"search.allocator": "llm"},
        "shared": {"search.allocator": "hybrid"},
        "shared_none": {"search.allocator": "hybrid", "search.llm_share": 0.0},
        "fake": {"search.allocator": "llm", "search.strategy": "paper"},
    }
    plan = load_experiment(_experiment(tmp_path, arms=arms, roles={"fake": "placebo"}))
    assert plan.roles == {
        "genetic": "classical",
        "moves": "llm",
        "shared": "llm",
        "shared_none": "classical",
        "fake": "placebo",
    }
    # No twin of any arm: it counts against all of them.
    assert plan.placebos == {"moves": ("fake",), "shared": ("fake",)}


def test_a_placebo_belongs_to_the_arm_that_it_copies(tmp_path: Path) -> None:
    arms: dict[str, Any] = {
        "moves": {"search.allocator": "llm"},
        "paper": {"search.allocator": "llm", "search.strategy": "paper"},
        "moves_fake": {"search.allocator": "llm"},
        "paper_fake": {"search.allocator": "llm", "search.strategy": "paper"},
    }
    roles = {"moves_fake": "placebo", "paper_fake": "placebo"}
    plan = load_experiment(_experiment(tmp_path, arms=arms, roles=roles))
    assert plan.placebos == {"moves": ("moves_fake",), "paper": ("paper_fake",)}


def test_workers_share_out_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_devices() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


@pytest.mark.parametrize(("number", "device"), [(0, "3"), (1, "5"), (2, "3")])
def test_workers_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch, number: int, device: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    take_device(number)
    assert visible_devices() == [device]


def test_the_recorded_cells_are_those_of_the_shipped_experiments() -> None:
    """Settings included: a default that moved would run finished cells again."""
    for file in sorted((CONFIGS / "experiments").glob("*.yaml")):
        recorded = CONFIGS.parent / "benchmarks" / "results" / f"{file.stem}.jsonl"
        cells = cells_of(load_experiment(file))
        for line in recorded.read_text().splitlines() if recorded.exists() else []:
            assert json.loads(line)["cell"] in cells


def test_two_processes_never_write_one_file_of_cells(tmp_path: Path) -> None:
    path, cell = tmp_path / "x.jsonl", {"n": 1}

    def figures(_: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ValueError, match="another process is writing to this file"):
            run_cells(path, [cell], lambda _: {"y": 2})
        return {"y": 1}

    assert run_cells(path, [cell], figures) == [{"cell": cell, "figures": {"y": 1}}]
    assert len(path.read_text().splitlines()) == 1
