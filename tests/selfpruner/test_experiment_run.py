"""A whole experiment on a tiny random model: cells, budgets, workers, page."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from agent.racing import NOT_FINITE
from pruning.plan import Plan
from selfpruner import profiling
from selfpruner.cli import main
from selfpruner.experiment import _Searches, _slug, _whole, cells_of
from selfpruner.experiment_config import load_experiment
from selfpruner.latency_table import Detail
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder


@pytest.fixture(scope="module")
def study(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an experiment with two budgets on a model of three layers."""
    experiment = {
        "base": str(tiny_run),
        "seeds": [0, 1],
        "budgets": [{"parameters": 0.7}, {"parameters": 0.5}],
        "matrix": {"search.allocator": ["genetic", "random"]},
    }
    file = tmp_path_factory.mktemp("study") / "study.yaml"
    file.write_text(yaml.safe_dump(experiment))
    return file


def _run(study: Path, name: str, *more: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what the command said and its rows."""
    folder = study.parent / name
    results = folder.with_suffix(".jsonl")
    arguments = ["experiment", str(study), "--out", str(folder), "--results", str(results), *more]
    said = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    return said.stdout, [json.loads(x) for x in results.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(study: Path) -> tuple[str, list[dict[str, Any]]]:
    before = torch.get_num_threads()
    ran = _run(study, "alone", "--threads", "1")
    torch.set_num_threads(before)
    return ran


def test_the_command_runs_every_cell_and_says_what_came_of_it(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    said, rows = alone
    assert [(x["cell"]["seed"], x["cell"]["budget"], x["cell"]["arm"]) for x in rows] == [
        (seed, budget, arm)
        for seed in (0, 1)
        for budget in ("parameters=0.7", "parameters=0.5")
        for arm in ("genetic", "random")
    ]
    assert "| genetic | classical | 4 |" in said
    assert "No arm asks an LLM." in said
    page = (study.parent / "alone" / "experiment.html").read_text()
    assert "8 <small>of 8</small>" in page
    # A smaller budget is a worse one: the cells were searched within their own.
    for arm in ("genetic", "random"):
        best = {
            x["cell"]["budget"]: x["figures"]["steps"][-1]["fitness"]
            for x in rows
            if x["cell"]["arm"] == arm and x["cell"]["seed"] == 0
        }
        assert best["parameters=0.5"] > best["parameters=0.7"] > 0


def test_one_model_is_ranked_once_for_all_budgets(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    del alone
    assert len(list((study.parent / "alone").rglob("arena*/**/order.json"))) == 1
    assert len(list((study.parent / "alone").rglob("candidates.jsonl"))) == 8


def test_two_workers_come_to_the_figures_of_one(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    _, rows = _run(study, "side_by_side", "--workers", "2", "--threads", "1")

    def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            json.dumps(x["cell"]): {k: v for k, v in x["figures"].items() if k != "seconds"}
            for x in rows
        }

    assert figures(rows) == figures(alone[1])
    logs = sorted(x.name for x in (study.parent / "side_by_side").glob("worker-*.log"))
    assert logs == ["worker-0.log", "worker-1.log"]


def test_a_search_of_another_ranking_is_not_gone_on_with(study: Path, tmp_path: Path) -> None:
    plan = load_experiment(study)
    cell = cells_of(plan)[0]
    searches = _Searches(plan, tmp_path, Progress(), None)
    searches(cell)
    (own,) = (x for x in tmp_path.rglob("order.json") if "arena" not in str(x))
    own.write_text(json.dumps({"order_hash": "of another machine"}))
    with pytest.raises(ValueError, match="the run began with of another machine"):
        searches(cell)


def test_names_of_models_that_read_alike_have_folders_of_their_own() -> None:
    names = ["org/name", "org_name", "models/x", "/models/x", "../models/x"]
    assert len({_slug(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", _slug(name)) for name in names)


def test_a_fitness_that_is_not_finite_has_a_word_in_json() -> None:
    assert _whole(0.5) == 0.5
    assert _whole(math.inf) == _whole(math.nan) == NOT_FINITE


def test_a_finished_experiment_loads_nothing(
    study: Path, alone: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfpruner.experiment.prepare", lambda *_: pytest.fail("loaded a model"))
    assert _run(study, "alone") == alone


def test_budgets_of_time_have_an_arena_for_every_workload(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that takes 1 ms, 1 a group and 0.1 a channel stands in for the stopwatch."""

    def timed(
        _: Any, plans: list[Plan], _workload: Any, detail: Detail, on_visit: Any
    ) -> NDArray[np.float64]:
        row = [1 + sum(x.kv_groups + 0.1 * x.mlp_channels for x in p.layers) for p in plans]
        on_visit()
        return np.array([row] * detail.rounds)

    monkeypatch.setattr(profiling, "timed", timed)
    asked = [
        {"speedup": 1.3, "tokens": 8},
        {"speedup": 1.6, "tokens": 8},
        {"speedup": 1.3, "tokens": 8, "phase": "prefill"},
        {"parameters": 0.7},
    ]
    experiment = {
        "base": str(tiny_run),
        "seeds": [0],
        "budgets": asked,
        "matrix": {"search.allocator": ["random"]},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(experiment))
    plan = load_experiment(file)
    cells = cells_of(plan)
    # Worker processes would not see the stand-in.
    searches = _Searches(plan, tmp_path / "times", Progress(), None)
    assert all(searches(cell)["seconds"] > 0 for cell in cells)
    assert [x["budget"] for x in cells] == [
        "speedup=1.3,tokens=8",
        "speedup=1.6,tokens=8",
        "speedup=1.3,phase=prefill,tokens=8",
        "parameters=0.7",
    ]
    (models,) = [x for x in (tmp_path / "times").iterdir() if x.is_dir()]
    arenas = {re.sub(r"-[0-9a-f]{12}", "", x.name) for x in models.glob("arena*")}
    assert arenas == {"arena-decode-1-8", "arena-prefill-1-8", "arena"}


def test_what_cannot_be_is_refused_before_the_first_cell(study: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(study.read_text()) | {"budgets": [{"parameters": 0.7}, {"macs": 0.001}]}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data))
    results = tmp_path / "x.jsonl"
    arguments = ["experiment", str(file), "--out", str(tmp_path / "o"), "--results", str(results)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "budget.macs: 0.001 cannot be met" in refused.stderr
    assert not results.exists()
    file.write_text(study.read_text())
    (tmp_path / "o").mkdir()
    with RunFolder(tmp_path / "o").locked():
        refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"selfpruner: {tmp_path / 'o'}: another process is at work in this folder\n",
    )


def test_what_is_edited_meanwhile_is_not_run_under_the_old_name(
    study: Path, tmp_path: Path
) -> None:
    plan = load_experiment(study)
    cell = cells_of(plan)[0] | {"settings": "another"}
    searches = _Searches(plan, tmp_path, Progress(StringIO()), 1)
    with pytest.raises(ValueError, match="were changed during the experiment"):
        searches(cell)


def test_streamed_models_are_not_ranked_by_several_workers(study: Path, tmp_path: Path) -> None:
    """They would write to the files that the others read."""
    file = tmp_path / "streamed.yaml"
    settings = {"settings": {"memory": "streamed"}}
    file.write_text(yaml.safe_dump(yaml.safe_load(study.read_text()) | settings))
    results = str(tmp_path / "x.jsonl")
    arguments = ["experiment", str(file), "--out", str(tmp_path / "x"), "--results", results]
    said = CliRunner().invoke(main, [*arguments, "--workers", "2"])
    assert said.exit_code == 2
    assert "memory: got streamed; allowed with --workers: whole" in said.output
    alone = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert alone.exit_code == 0
    assert not [*(tmp_path / "x").rglob("scratch")]
