"""The front on a tiny model: budgets met, effort shared out, each begun beside its neighbour."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.candidate import Candidate
from agent.graph import SearchResult
from agent.ledger import Ledger
from pruning.plan import Plan
from selfpruner.arena import Arena
from selfpruner.config import RunConfig, load_config
from selfpruner.finishing import best_on_fresh_tokens
from selfpruner.front import Front, _config, front, knee
from selfpruner.progress import Progress
from selfpruner.results import FrontPoint
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.workbench import prepare

TARGETS = (0.9, 0.8, 0.6, 0.5)


@pytest.fixture(scope="module")
def arena(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arena, RunFolder]:
    settings = ("search.evaluations=20", "front.targets=[0.9, 0.8, 0.6, 0.5]")
    config = load_config(tiny_run, settings=settings)
    folder = RunFolder.create(tmp_path_factory.mktemp("front") / "run", config)
    return Arena.open(prepare(config, Progress()), folder, Progress()), folder


@pytest.fixture(scope="module")
def found(arena: tuple[Arena, RunFolder]) -> SearchResult:
    return search(arena[0], arena[0].bench.config, arena[1], Progress())


@pytest.fixture(scope="module")
def made(arena: tuple[Arena, RunFolder], found: SearchResult) -> Front:
    own = best_on_fresh_tokens(found, arena[0].selection)
    return front(arena[0], found, own, arena[1], Progress())


@pytest.fixture(scope="module")
def points(made: Front) -> tuple[FrontPoint, ...]:
    return made.points


def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_done(tiny_run: Path) -> None:
    settings = ["front.targets=[0.9, 0.01]"]
    with pytest.raises(ValueError, match=r"^front\.targets: got 0\.01: budget\.parameters: 0\.01 "):
        prepare(load_config(tiny_run, settings=settings), Progress())


def test_probes_are_shared_and_one_plan_stays_one_plan(tiny_run: Path, tmp_path: Path) -> None:
    """Further budgets measure no block again; an allocator without a search has none there."""
    for number, (allocator, probes) in enumerate([("guided", 1), ("flap_global", 0)]):
        settings = [f"search.allocator={allocator}", f"search.probes={probes}"]
        settings += ["front.targets=[0.5]", "search.evaluations=40"]
        config = load_config(tiny_run, settings=settings)
        folder = RunFolder.create(tmp_path / str(number), config)
        arena = Arena.open(prepare(config, Progress()), folder, Progress())
        found = search(arena, config, folder, Progress())
        own = best_on_fresh_tokens(found, arena.selection)
        front(arena, found, own, folder, Progress())
        assert bool(Ledger(folder.path).probes()) == bool(probes)
        there = Ledger(folder / "front/0.5")
        assert not there.probes()
        assert (len(there.candidates()) == 1) == (allocator == "flap_global")


def test_a_front_has_its_share_of_the_time(tiny_run: Path) -> None:
    asked = ["front.targets=[0.5]", "front.effort=0.25", "search.seconds=100"]
    config = load_config(tiny_run, settings=asked)
    assert _config(config, 0.5).search.seconds == 25


def test_every_budget_has_a_plan_within_it_and_tight(
    arena: tuple[Arena, RunFolder], points: tuple[FrontPoint, ...]
) -> None:
    bench, folder = arena[0].bench, arena[1]
    assert [x.target for x in points] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for point in points[1:]:
        config = load_config(folder.config, settings=[f"budget.parameters={point.target}"])
        budget = bench.proposing(config).budget
        levels = bench.grid.levels(Plan.from_json(point.plan))
        assert budget.is_within(levels)
        assert budget.is_tight(levels)
        assert point.achieved == pytest.approx(budget.achieved(levels))
    parameters = [x.parameters for x in points]
    assert parameters == sorted(parameters, reverse=True)
    assert json.loads((folder / "front.json").read_text())["points"] == [
        x.model_dump(mode="json") for x in points
    ]


def test_the_budget_of_the_run_is_not_searched_again(
    arena: tuple[Arena, RunFolder], found: SearchResult, points: tuple[FrontPoint, ...]
) -> None:
    own = next(x for x in points if x.target == 0.7)
    assert own.evaluations == found.evaluations
    assert sorted(x.name for x in (arena[1] / "front").iterdir()) == ["0.5", "0.6", "0.8", "0.9"]


def test_fitness_is_that_of_the_plan_that_was_selected(
    arena: tuple[Arena, RunFolder], found: SearchResult
) -> None:
    """Fresh tokens may choose another finalist than the best of the search."""
    second = found.finalists[1]
    assert second.fitness != found.best.fitness
    made = front(
        replace(arena[0], bench=arena[0].bench.proposing(_alone(arena[1]))),
        found,
        (second, 0.5),
        arena[1],
        Progress(),
    )
    own = made.points[-1]
    assert Plan.from_json(own.plan) == second.plan
    assert (own.fitness, own.selection_fitness) == (second.fitness, 0.5)


def _alone(folder: RunFolder) -> RunConfig:
    """Return the configuration of the run without further budgets."""
    return load_config(folder.config, settings=["front.targets=[]"])


def test_a_finalist_that_is_not_finite_is_selected_last(found: SearchResult) -> None:
    class Judge:
        num_sequences = 2

        def __call__(self, plans: Sequence[Plan], _: Sequence[int]) -> NDArray[np.float64]:
            return np.array(
                [[math.nan, 0.1], *[[0.9 - 0.1 * i] * 2 for i in range(len(plans) - 1)]]
            )

    selection: Any = Judge()
    best, fitness = best_on_fresh_tokens(found, selection)
    assert best == found.finalists[-1]
    assert math.isfinite(fitness)


def _scored(folder: RunFolder, target: float) -> list[Candidate]:
    return Ledger(folder / f"front/{target:g}").candidates()


@pytest.mark.usefixtures("points")
def test_further_budgets_share_out_their_effort(arena: tuple[Arena, RunFolder]) -> None:
    config = arena[0].bench.config
    whole, few = config.search.evaluations, config.front.effort * config.search.evaluations
    # Four more budgets and the run's own: at most two and a half searches.
    assert whole + len(TARGETS) * few <= 2.5 * whole
    for target in TARGETS:
        spent = Ledger(arena[1] / f"front/{target:g}").equivalents()
        assert few - 2 < spent <= few  # a last generation of windows is a plan and the first one


def test_each_budget_begins_with_the_plan_of_its_neighbour(
    arena: tuple[Arena, RunFolder], points: tuple[FrontPoint, ...]
) -> None:
    bench, by_target = arena[0].bench, {x.target: x for x in points}
    for target, neighbour in ((0.8, 0.7), (0.9, 0.8), (0.6, 0.7), (0.5, 0.6)):
        plan = Plan.from_json(by_target[neighbour].plan)
        shares = bench.space.shares(bench.grid.levels(plan))
        settings = [f"budget.parameters={target}"]
        there = bench.proposing(load_config(arena[1].config, settings=settings))
        start = there.grid.plan(there.space.project(shares))
        first = [x.plan for x in _scored(arena[1], target) if x.generation == 0]
        assert start in first


def test_the_dense_model_begins_the_front(
    arena: tuple[Arena, RunFolder], points: tuple[FrontPoint, ...]
) -> None:
    bench, dense = arena[0].bench, points[0]
    assert Plan.from_json(dense.plan) == Plan.dense(bench.architecture)
    assert (dense.target, dense.achieved, dense.speedup, dense.evaluations) == (1.0, 1.0, 1.0, 0)
    assert dense.parameters == bench.architecture.total_parameters()
    assert dense.fitness == pytest.approx(0, abs=1e-6)  # divergence from itself
    for point in points:
        assert point.milliseconds == arena[0].speed.milliseconds(Plan.from_json(point.plan))


def test_each_pick_is_what_it_says(
    arena: tuple[Arena, RunFolder], made: Front, points: tuple[FrontPoint, ...]
) -> None:
    pruned = points[1:]
    assert made.picked("budget", 0.7).point.target == 0.7
    fastest = made.picked("fastest", 0.7)
    assert fastest.point.milliseconds == min(x.milliseconds for x in pruned)
    best = made.picked("most-accurate", 0.7)
    assert best.point.selection_fitness == min(x.selection_fitness for x in pruned)
    for stop in (fastest, best):
        assert stop.selected.plan == Plan.from_json(stop.point.plan)
        assert stop.arena.bench.budget.target == stop.point.target
        assert stop.arena.selection is arena[0].selection
    told = json.loads((arena[1] / "front.json").read_text())
    assert told["picked"] == {"by": "budget", "target": 0.7}


def _at(milliseconds: float, fitness: float) -> FrontPoint:
    return FrontPoint(
        target=1.0,
        achieved=1.0,
        parameters=1,
        speedup=10 / milliseconds,
        milliseconds=milliseconds,
        fitness=fitness,
        selection_fitness=fitness,
        evaluations=1,
        seconds=0.0,
        plan=((1, 1, 1),),
    )


@pytest.mark.parametrize(
    ("pruned", "index"),
    [
        # Distances below the chord from (10, 0) to (5, 1): 0.2 - 0.05, 0.6 - 0.2, 0.8 - 0.5, 0.
        ([(9, 0.05), (7, 0.2), (6, 0.5), (5, 1.0)], 2),
        ([(9, 0.5), (7, 0.9), (5, 1.0)], 3),  # all above: the fastest one
        ([(9, 0.1), (8, 0.2), (5, 1.0)], 2),  # 0.1 and 0.2
        ([(8, 0.2), (7, 0.4), (5, 1.0)], 1),  # a tie: the first
        ([(9, 0.5)], 1),
        ([(12, 0.5), (11, 0.3)], 2),  # nothing is faster: the fitter one
        ([(9, -0.1), (8, -0.2)], 2),  # nothing is worse
    ],
)
def test_the_knee_by_hand(pruned: list[tuple[float, float]], index: int) -> None:
    assert knee([_at(10, 0.0), *(_at(*x) for x in pruned)]) == index
