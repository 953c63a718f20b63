"""A budget of predicted time, from the configuration to the plan, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from pruning.plan import Plan
from selfpruner import profiling
from selfpruner.arena import Arena
from selfpruner.cli import main
from selfpruner.config import load_config
from selfpruner.finishing import best_on_fresh_tokens
from selfpruner.front import front
from selfpruner.latency_table import Detail
from selfpruner.progress import Progress
from selfpruner.results import Results
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.workbench import prepare


def _takes(plan: Plan) -> float:
    """Milliseconds on a machine whose channels are worked in tiles of 16."""
    return 3 + sum(x.kv_groups + 0.5 * -(-x.mlp_channels // 16) for x in plan.layers)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Stands in for the stopwatch; keeps how many models each measurement timed."""
    monkeypatch.setenv("SELFPRUNER_CACHE", str(tmp_path / "cache"))
    counts: list[int] = []

    def timed(
        _: Any, plans: list[Plan], _workload: Any, detail: Detail, on_visit: Any
    ) -> NDArray[np.float64]:
        counts.append(len(plans))
        on_visit()
        return np.array([[_takes(x) for x in plans]] * detail.rounds)

    monkeypatch.setattr(profiling, "timed", timed)
    return counts


def test_a_search_within_a_speedup(tiny_run: Path, machine: list[int], tmp_path: Path) -> None:
    config = load_config(
        tiny_run, budget="speedup=1.4", settings=["budget.tokens=8", "front.targets=[1.2]"]
    )
    folder = RunFolder.create(tmp_path / "run", config)
    bench = prepare(config, Progress(), folder)
    assert bench.grid.mlp == (16, 32, 48)  # 8 takes as long as 16, 24 as 32, 40 as 48
    arena = Arena.open(bench, folder, Progress())
    assert len(machine) == 1
    assert arena.speed is bench.table
    found = search(arena, config, folder, Progress())
    dense = _takes(Plan.dense(bench.architecture))
    for candidate in found.finalists:
        speedup = dense / _takes(candidate.plan)
        assert speedup >= 1.4
        assert bench.achieved(candidate.plan) == pytest.approx(speedup, rel=1e-5)
        assert bench.budget.is_tight(bench.grid.levels(candidate.plan))
    own = best_on_fresh_tokens(found, arena.selection)
    points = front(arena, found, own, folder, Progress()).points
    assert [x.target for x in points] == [1.0, 1.2, 1.4]
    assert all(x.achieved >= x.target for x in points)
    assert points[1].milliseconds == pytest.approx(_takes(Plan.from_json(points[1].plan)))
    # A resumed run means the table that it began with, whatever the machine does meanwhile.
    (tmp_path / "cache").rename(tmp_path / "gone")
    again = prepare(config, Progress(), folder)
    assert (again.table, again.grid, again.budget) == (bench.table, bench.grid, bench.budget)
    assert len(machine) == 1


def test_a_latency_fitness_has_a_fine_table_too(
    tiny_run: Path, machine: list[int], tmp_path: Path
) -> None:
    settings = ["fitness={kl: 1.0, latency: 3.0}", "search.evaluations=2"]
    config = load_config(tiny_run, settings=settings)
    folder = RunFolder.create(tmp_path / "run", config)
    arena = Arena.open(prepare(config, Progress(), folder), folder, Progress())
    assert str(arena.speed.workload) == "prefill, batch 1, 16 tokens"
    assert arena.bench.grid.mlp == (16, 32, 48)
    plain = load_config(tiny_run)
    coarse_folder = RunFolder.create(tmp_path / "coarse", plain)
    coarse = Arena.open(prepare(plain, Progress()), coarse_folder, Progress())
    assert coarse.bench.grid.mlp == tuple(range(8, 49, 8))
    assert machine[1] < machine[0]
    dense = Plan.dense(arena.bench.architecture)
    small = arena.bench.grid.plan([(0, 0)] * 3)
    share = _takes(small) / _takes(dense)
    extra = arena.score([small], [0]) - coarse.score([small], [0])
    assert extra[0, 0] == pytest.approx(3 * share, rel=1e-4)


@pytest.mark.usefixtures("machine")
def test_what_no_plan_reaches_is_refused_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["compress", str(tiny_run), "--budget", "speedup=9", "--out", str(out)]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 2
    assert "budget.speedup: 9 cannot be met; the smallest plan of this grid is " in said.stderr
    assert not out.exists()


@pytest.mark.usefixtures("machine")
def test_the_picked_plan_is_finished(tiny_run: Path, tmp_path: Path) -> None:
    """The whole command: the fastest plan of a front of speedups is what is exported."""
    out = tmp_path / "run"
    settings = ("front.targets=[1.2, 1.6]", "evaluation.tasks=[]", "search.evaluations=4")
    speed = "evaluation.speed={repeats: 1, new_tokens: 2}"
    arguments = ["compress", str(tiny_run), "--budget", "speedup=1.4", "--pick", "fastest"]
    arguments += ["--out", str(out), "--set", speed, "--set", "budget.tokens=8"]
    for setting in settings:
        arguments += ["--set", setting]
    said = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    results = Results.load(out / "results.json")
    assert (results.budget.kind, results.budget.target) == ("speedup", 1.6)
    assert results.budget.achieved >= 1.6
    told = json.loads((out / "front.json").read_text())
    assert told["picked"] == {"by": "fastest", "target": 1.6}
    plan = [[x.kv_groups, x.q_per_group, x.mlp_channels] for x in results.units]
    assert plan in [x["plan"] for x in told["points"] if x["target"] == 1.6]
    assert any("front.pick fastest" in x for x in results.warnings)
    assert [(x.phase, x.tokens) for x in results.speed.rows] == [("prefill", 8), ("decode", 8)]
    page = (out / "report.html").read_text()
    assert "Budget on speedup: asked a predicted 1.60\N{MULTIPLICATION SIGN} the speed" in page
