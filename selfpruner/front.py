"""The front: plans for several budgets from one ranked model, each search begun where one ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agent.candidate import Candidate
from agent.graph import SearchResult
from agent.ledger import Ledger
from pruning.plan import Plan
from selfpruner.arena import Arena
from selfpruner.config import RunConfig
from selfpruner.finishing import best_on_fresh_tokens, mean_fitness
from selfpruner.progress import Progress
from selfpruner.results import FrontPoint
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.settings import Pick

_DENSE = 1.0  # as a share and as a speedup


@dataclass(frozen=True)
class Stop:
    """One budget of the front: where its plans compete, and what was found.

    Attributes:
        arena: the run's, within this budget.
        selected: the finalist that does best on fresh tokens.
        fitness: its fitness on them.
        point: what the front tells of it.
    """

    arena: Arena
    selected: Candidate
    fitness: float
    point: FrontPoint


@dataclass(frozen=True)
class Front:
    """The dense model and the plan of every budget, from the largest model to the smallest."""

    dense: FrontPoint
    stops: tuple[Stop, ...]

    @property
    def points(self) -> tuple[FrontPoint, ...]:
        """The dense model, then every plan."""
        return self.dense, *(x.point for x in self.stops)

    def picked(self, pick: Pick, target: float) -> Stop:
        """Return the plan that is to be finished.

        `budget` is that of the run's own `target`, `fastest` the one with the least predicted
        time, `most-accurate` the one with the lowest fitness on fresh tokens, and `knee` that of
        `knee`. The dense model is none of them.
        """
        if pick == "budget":
            return next(x for x in self.stops if x.point.target == target)
        if pick == "knee":
            return self.stops[knee(self.points) - 1]
        measures: dict[Pick, Callable[[FrontPoint], float]] = {
            "fastest": _time,
            "most-accurate": _fitness,
        }
        return min(self.stops, key=lambda x: measures[pick](x.point))


def knee(points: Sequence[FrontPoint]) -> int:
    """Return the index of the knee: the pruned point farthest below the chord.

    Of each point x is the predicted time and y the fitness on fresh tokens, both scaled so that
    the dense model, the first point, has x 1 and y 0 and the fastest plan x 0 and y 1 (Satopaa et
    al., "Finding a Kneedle in a Haystack", 2011, without its smoothing). The chord joins those two
    and the distance below it is (1 - x - y) / sqrt(2); of equal distances the first counts. The
    fastest plan itself has distance 0: it is the knee where all others lie above the chord. Where
    no plan is faster or worse than the dense model there is no chord: the plan of the lowest
    fitness is taken.
    """
    dense, pruned = points[0], points[1:]
    fastest = min(pruned, key=_time)
    time, loss = _time(dense) - _time(fastest), _fitness(fastest) - _fitness(dense)
    if time <= 0 or not 0 < loss < math.inf:
        return 1 + min(range(len(pruned)), key=lambda i: _fitness(pruned[i]))

    def below(point: FrontPoint) -> float:
        x = (_time(point) - _time(fastest)) / time
        return 1 - x - (_fitness(point) - _fitness(dense)) / loss

    return 1 + max(range(len(pruned)), key=lambda i: (below(pruned[i]), -i))


def front(
    arena: Arena,
    found: SearchResult,
    own: tuple[Candidate, float],
    folder: RunFolder,
    progress: Progress,
) -> Front:
    """Return the dense model and the best plan of the run's budget and of each of `front.targets`.

    Budgets are searched from the run's own outwards. Each has the ranking, the corrections, the
    dense references and the probes of the run, `front.effort` of its evaluations, and begins with
    the plan of the nearest budget that is done, projected onto its own. `own` is the plan that the
    run's search came to, with its fitness on fresh tokens.

    Raises:
        ValueError: a budget cannot be met, or the run's own is a total.
        KeyboardInterrupt: a signal asked for a stop.
    """
    config = arena.bench.config
    here = config.budget.target
    there = {t for t in config.front.targets if t not in (here, _DENSE)}
    stops = {here: Stop(arena, *own, _point(arena, found, *own))}
    for target in sorted(there, key=lambda t: (abs(t - here), t)):
        nearest = stops[min(stops, key=lambda t: (abs(t - target), t))]
        stops[target] = _searched(arena, target, nearest.selected.plan, folder, progress)
    largest_first = sorted(stops, reverse=config.budget.kind != "speedup")
    made = Front(_dense_point(arena), tuple(stops[t] for t in largest_first))
    folder.write_json("front.json", _told(arena, made))
    return made


def _searched(
    arena: Arena, target: float, nearest: Plan, folder: RunFolder, progress: Progress
) -> Stop:
    probes = Ledger(folder.path).probes()
    budget = arena.bench.budget.at(target)
    there = arena.within(budget, _config(arena.bench.config, target))
    shares = arena.bench.space.shares(arena.bench.grid.levels(nearest))
    start = there.bench.grid.plan(there.bench.space.project(shares))
    own = RunFolder.begun(folder / f"front/{target:.12g}", there.bench.config)
    progress.note(f"front: {budget.kind} {target:g}")
    found = search(there, there.bench.config, own, progress, (start,), probes)
    best = best_on_fresh_tokens(found, there.selection)
    return Stop(there, *best, _point(there, found, *best))


def _config(config: RunConfig, target: float) -> RunConfig:
    """Return the configuration of one more budget: less time, no LLM and no new probes."""
    search = config.search
    few = max(1, round(config.front.effort * search.evaluations))
    by = search.classical if search.asks_llm else search.allocator
    seconds = None if search.seconds is None else config.front.effort * search.seconds
    settings = {"evaluations": few, "seconds": seconds, "allocator": by, "probes": 0}
    return config.model_copy(
        update={
            "budget": config.budget.model_copy(update={config.budget.kind: target}),
            "search": config.search.model_copy(update=settings),
        }
    )


def _point(
    arena: Arena, found: SearchResult, selected: Candidate, selection_fitness: float
) -> FrontPoint:
    """Return the figures of the plan that was selected, which need not be the search's best."""
    return FrontPoint(
        target=arena.bench.budget.target,
        achieved=arena.bench.achieved(selected.plan),
        fitness=selected.fitness,
        selection_fitness=selection_fitness,
        evaluations=found.evaluations,
        seconds=found.seconds,
        **_facts(arena, selected.plan),
    )


def _dense_point(arena: Arena) -> FrontPoint:
    plan = Plan.dense(arena.bench.architecture)
    return FrontPoint(
        target=_DENSE,
        achieved=_DENSE,
        fitness=mean_fitness(arena.score, [plan])[0],
        selection_fitness=mean_fitness(arena.selection, [plan])[0],
        evaluations=0,
        seconds=0.0,
        **_facts(arena, plan),
    )


def _facts(arena: Arena, plan: Plan) -> dict[str, Any]:
    bench = arena.bench
    has_biases = bench.recipe.has_biases and plan != Plan.dense(bench.architecture)
    return {
        "parameters": bench.architecture.total_parameters(plan, has_biases),
        "speedup": arena.speed.speedup(plan),
        "milliseconds": arena.speed.milliseconds(plan),
        "plan": tuple((a, b, c) for a, b, c in plan.to_json()),
    }


def _told(arena: Arena, made: Front) -> dict[str, Any]:
    config = arena.bench.config
    picked = made.picked(config.front.pick, config.budget.target)
    return {
        "schema_version": 1,
        "model": config.model,
        "kind": arena.bench.budget.kind,
        "fitness": config.fitness,
        "milliseconds_of": str(arena.speed.workload),
        "picked": {"by": config.front.pick, "target": picked.point.target},
        "points": [x.model_dump(mode="json") for x in made.points],
    }


def _time(point: FrontPoint) -> float:
    """Return the predicted milliseconds, or the share of the dense time in files without them."""
    return 1 / point.speedup if point.milliseconds is None else point.milliseconds


def _fitness(point: FrontPoint) -> float:
    return math.inf if point.selection_fitness is None else point.selection_fitness
