"""The front: plans for several budgets from one ranked model, each search begun where one ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent.graph import SearchResult
from pruning.plan import Budget, Plan
from selfpruner.arena import Arena
from selfpruner.config import RunConfig
from selfpruner.finishing import best_on_fresh_tokens
from selfpruner.progress import Progress
from selfpruner.results import FrontPoint
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search


def front(
    arena: Arena, found: SearchResult, folder: RunFolder, progress: Progress
) -> tuple[FrontPoint, ...]:
    """Return the best plan of the run's budget and of each of `front.targets`, largest first.

    Budgets are searched from the run's own outwards. Each has the ranking, the corrections and
    the dense references of the run, `front.effort` of its evaluations, and begins with the plan
    of the nearest budget that is done, projected onto its own.

    Raises:
        ValueError: a budget cannot be met, or the run's own is no share.
        KeyboardInterrupt: a signal asked for a stop.
    """
    config = arena.bench.config
    targets = {t for t in config.front.targets if t != config.budget.target}
    points = {config.budget.target: _point(arena, config.budget.target, found)}
    for target in sorted(targets, key=lambda t: (abs(t - config.budget.target), t)):
        nearest = points[min(points, key=lambda t: (abs(t - target), t))]
        points[target] = _searched(arena, target, nearest, folder, progress)
    front_points = tuple(points[t] for t in sorted(points, reverse=True))
    folder.write_json("front.json", _told(arena, front_points))
    return front_points


def _searched(
    arena: Arena, target: float, nearest: FrontPoint, folder: RunFolder, progress: Progress
) -> FrontPoint:
    there = arena.within(_budget(arena, target), _config(arena.bench.config, target))
    shares = arena.bench.space.shares(arena.bench.grid.levels(Plan.from_json(nearest.plan)))
    start = there.bench.grid.plan(there.bench.space.project(shares))
    own = RunFolder.begun(folder / f"front/{target:g}", there.bench.config)
    progress.note(f"front: {there.bench.budget.kind} {target:g}")
    return _point(there, target, search(there, there.bench.config, own, progress, starts=(start,)))


def _config(config: RunConfig, target: float) -> RunConfig:
    """Return the configuration of one more budget: fewer evaluations, and no LLM."""
    few = max(1, round(config.front.effort * config.search.evaluations))
    settings = {"evaluations": few, "allocator": config.search.classical}
    return config.model_copy(
        update={
            "budget": config.budget.model_copy(update={config.budget.kind: target}),
            "search": config.search.model_copy(update=settings),
        }
    )


def _budget(arena: Arena, target: float) -> Budget:
    """Return the run's budget at another share of the blocks.

    Raises:
        ValueError: the smallest plan of the grid costs more.
    """
    budget = arena.bench.budget
    smallest = budget.cost([(0, 0)] * len(budget.mlp))
    if target * budget.dense < smallest:
        raise ValueError(
            f"front.targets: {target:g} cannot be met; the smallest plan of this grid keeps "
            f"{smallest / budget.dense:.4f} of the blocks"
        )
    return replace(budget, target=target, limit=target * budget.dense)


def _point(arena: Arena, target: float, found: SearchResult) -> FrontPoint:
    bench = arena.bench
    candidate, selected = best_on_fresh_tokens(found, arena.selection)
    plan = candidate.plan
    return FrontPoint(
        target=target,
        achieved=bench.achieved(plan),
        parameters=bench.architecture.total_parameters(plan, bench.recipe.has_biases),
        speedup=arena.speed.speedup(plan),
        fitness=found.best.fitness,
        selection_fitness=selected,
        evaluations=found.evaluations,
        seconds=found.seconds,
        plan=tuple((a, b, c) for a, b, c in plan.to_json()),
    )


def _told(arena: Arena, points: tuple[FrontPoint, ...]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": arena.bench.config.model,
        "kind": arena.bench.budget.kind,
        "fitness": arena.bench.config.fitness,
        "points": [x.model_dump(mode="json") for x in points],
    }
