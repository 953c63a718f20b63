"""The surrogate: right about additive fitness after a few plans, humble about anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent import population, probes
from agent.candidate import Candidate
from agent.graph import run_search
from agent.knapsack import knapsack
from agent.ledger import Anchor
from agent.loss_curves import Curves, loss_curves
from agent.projection import Levels, Space
from agent.settings import RacingSettings
from agent.state import SearchContext
from agent.surrogate import Surrogate, fit, surrogate
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid

Scene = Callable[..., SearchContext]


def space_of(layers: int) -> Space:
    architecture = Architecture("llama", layers, 576, 9, 3, 64, 1536, 49152, True)
    grid = Grid.of(architecture, 64)
    return Space(grid, Budget.of(architecture, grid, "parameters", 0.7))


class Additive:
    """Fitness that is the sum of the curves, each scaled by a number that nobody is told."""

    def __init__(self, space: Space, seed: int, spread: float, base: float = 0.3) -> None:
        self.base = base
        rng = np.random.default_rng(seed)
        self.curves: Curves = [
            [rng.exponential() * (1 - kept) ** 2 for kept in space.kept]
            for _ in range(space.layers)
        ]
        self.scales = np.exp(spread * rng.standard_normal((space.layers, 2)))

    def __call__(self, levels: Levels) -> float:
        return self.base + sum(
            scale * curve[level]
            for scales, curves, pair in zip(self.scales, self.curves, levels, strict=True)
            for scale, curve, level in zip(scales, curves, pair, strict=True)
        )


def neighbours(space: Space, start: Levels, count: int, seed: int) -> list[Levels]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        levels = start
        for _ in range(int(rng.integers(1, 8))):
            levels = population.mutate(levels, space, rng)
        found.append(levels)
    return found


def agreement(model: Surrogate, truth: Additive, plans: list[Levels]) -> float:
    """Return the rank correlation of predicted and true fitness."""
    ranks = [
        np.argsort(np.argsort([f(x) for x in plans])).astype(float) for f in (model.predict, truth)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(("layers", "least"), [(6, 0.95), (30, 0.85)])
def test_it_learns_to_rank_an_additive_fitness(layers: int, least: float) -> None:
    """From 40 plans, of 12 and of 60 blocks, whose scales are off by a factor of e and more."""
    space = space_of(layers)
    before, after = [], []
    for seed in range(6):
        truth = Additive(space, seed, spread=1.0)
        start = knapsack(space, [[x.tolist() for x in pair] for pair in truth.curves])
        plans = neighbours(space, start, 60, seed)
        told, asked = plans[:40], plans[40:]
        before.append(agreement(fit(truth.curves, [], [], []), truth, asked))
        model = fit(truth.curves, told, [truth(x) for x in told], [1.0] * 40)
        after.append(agreement(model, truth, asked))
    assert np.mean(after) > least
    assert np.mean(after) > np.mean(before) + 0.1


def test_with_the_scales_it_predicts_the_fitness_itself() -> None:
    space = space_of(6)
    truth = Additive(space, 1, spread=0.3, base=0.0)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 80, 1)
    model = fit(truth.curves, plans[:60], [truth(x) for x in plans[:60]], [1.0] * 60)
    errors = [model.predict(x) - truth(x) for x in plans[60:]]
    assert np.std(errors) < 0.1 * np.std([truth(x) for x in plans[60:]])


def test_a_plan_that_has_seen_less_is_trusted_less() -> None:
    space = space_of(6)
    truth = Additive(space, 2, spread=0.5)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 60, 2)
    fitness = np.array([truth(x) for x in plans])
    shares = np.tile([1.0, 0.05], 30)
    noise = np.random.default_rng(0).standard_normal(60) * np.where(shares < 1, fitness.std(), 0)
    scores, error = (fitness + noise).tolist(), np.sqrt(0.05) * fitness.std() / fitness.mean()
    told = fit(truth.curves, plans, scores, shares.tolist(), error=error)
    untold = fit(truth.curves, plans, scores, [1.0] * 60, error=error)
    asked = neighbours(space, plans[0], 60, 3)
    assert agreement(told, truth, asked) > agreement(untold, truth, asked)


def test_the_table_is_what_is_predicted() -> None:
    space = space_of(6)
    truth = Additive(space, 3, spread=0.5)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 30, 3)
    model = fit(truth.curves, plans, [truth(x) for x in plans], [1.0] * 30)
    table = model.table()
    sums = [sum(table[i][b][x[b]] for i, x in enumerate(p) for b in (0, 1)) for p in plans]
    gaps = np.array([model.predict(x) for x in plans]) - sums
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-12)
    assert min(min(block) for layer in table for block in layer) >= 0
    best = knapsack(space, table)
    assert model.predict(best) <= min(model.predict(x) for x in plans)
    assert truth(best) < np.mean([truth(x) for x in plans])


def test_samples_depend_on_the_generator_alone() -> None:
    space = space_of(6)
    truth = Additive(space, 4, spread=0.5)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 30, 4)
    model = fit(truth.curves, plans[:10], [truth(x) for x in plans[:10]], [1.0] * 10)
    first, again, other = (
        [model.sampled(np.random.default_rng(x)).predict(p) for p in plans] for x in (1, 1, 2)
    )
    assert first == again != other
    certain = model.sampled(np.random.default_rng(1))
    assert certain.sampled(np.random.default_rng(2)).predict(plans[0]) == pytest.approx(first[0])
    spread = [model.sampled(np.random.default_rng(x)).predict(plans[20]) for x in range(50)]
    more = fit(truth.curves, plans, [truth(x) for x in plans], [1.0] * 30)
    less = [more.sampled(np.random.default_rng(x)).predict(plans[20]) for x in range(50)]
    assert np.std(less) < np.std(spread)


def test_windows_of_other_difficulty_change_nothing() -> None:
    """A window on which every plan loses twice as much says nothing of its plans."""
    space = space_of(6)
    truth = Additive(space, 5, spread=0.5, base=0.0)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 40, 5)
    windows = [i // 8 for i in range(40)]
    plain = np.array([truth(x) for x in plans])
    hard = plain * np.array([1.0, 2.0, 0.5, 3.0, 1.5])[windows]
    first, second = (
        fit(truth.curves, plans, y.tolist(), [1.0] * 40, windows) for y in (plain, hard)
    )
    np.testing.assert_allclose(first.mean, second.mean)
    blind = fit(truth.curves, plans, hard.tolist(), [1.0] * 40)
    asked = neighbours(space, plans[0], 60, 6)
    assert agreement(second, truth, asked) > 0.95 > agreement(blind, truth, asked)


@pytest.mark.parametrize("fitness", [[1.0] * 5, [1.0, 1.0 + 1e-15, 1.0, 1.0, 1.0], [0.0] * 5])
def test_plans_of_equal_fitness_teach_nothing_and_break_nothing(fitness: list[float]) -> None:
    space = space_of(6)
    truth = Additive(space, 6, spread=0.0)
    plans = neighbours(space, space.project(np.full((6, 2), 0.7)), 5, 6)
    model = fit(truth.curves, plans, fitness, [1.0] * 5)
    values = [x.predict(plans[0]) for x in (model, model.sampled(np.random.default_rng(0)))]
    assert np.isfinite(values).all()


def test_it_is_a_function_of_earlier_generations(scene: Scene, tmp_path: Path) -> None:
    context = scene(folder=tmp_path, probes=1, sensitive=False, racing=RacingSettings())
    run_search(context, tmp_path / "checkpoints.sqlite")
    plans = neighbours(context.space, context.first_plan, 30, 7)
    again = scene(folder=tmp_path, probes=1, sensitive=False, racing=RacingSettings())
    for generation in (0, 1, 3):
        first, second = (surrogate(x, generation) for x in (context, again))
        assert [first.predict(x) for x in plans] == [second.predict(x) for x in plans]
    late, early = surrogate(context, 3), surrogate(context, 1)
    assert [late.predict(x) for x in plans] != [early.predict(x) for x in plans]


def _add(context: SearchContext, generation: int, levels: Levels, values: list[float]) -> None:
    """Put a plan into the ledger that has these values on the window of its generation."""
    plan = context.grid.plan(levels)
    context.ledger.add_candidate(
        Candidate(
            id=len(context.ledger.candidates()),
            generation=generation,
            slot=0,
            operator="generate",
            origin="classical",
            parents=(),
            genotype=tuple((x.kv_groups, x.q_per_group, x.mlp_channels) for x in plan.layers),
            key=plan.key,
            scores={
                "fitness": float(np.mean(values)),
                "stderr": 0.0,
                "sequences": 2,
                "of": 2,
                "values": values,
            },
            accuracy=None,
            speedup=None,
            tokens=0,
            seconds=0.0,
        )
    )


@pytest.mark.parametrize("is_known", [True, False])
def test_a_generation_that_is_all_worse_than_the_first_plan_says_so(
    scene: Scene, tmp_path: Path, is_known: bool
) -> None:
    """All of it cut one block; only beside the first plan does it show what that costs."""
    context = scene(folder=tmp_path, window=2, allocator="guided")
    start = context.first_plan
    _add(context, 0, start, [1.0, 1.0])
    assert start[2][1] >= 2
    cut = [list(pair) for pair in start]
    cut[2][1] -= 2
    plans = []
    for layer in (0, 1, 3):
        others = [list(pair) for pair in cut]
        others[layer][1] += 1
        plans.append([(a, m) for a, m in others])
        _add(context, 1, plans[-1], [1.4, 1.4])
    if is_known:
        context.ledger.add_anchor(Anchor(1, 0, (2, 3), (1.0, 1.0), 2))
    found = surrogate(context, 2)
    ratio = np.mean([found.predict(x) for x in plans]) / found.predict(start)
    assert (ratio > 1.2) == is_known


def test_probes_tell_what_cut_errors_do_not(scene: Scene, tmp_path: Path) -> None:
    """The scene's fitness is additive; cut errors that know no layer learn it from the probes."""
    context = scene(folder=tmp_path, probes=1, sensitive=False)
    list(probes.measured(context))
    plans = neighbours(context.space, context.first_plan, 60, 8)
    truth = [context.score.of(context.grid.plan(x)) for x in plans]  # type: ignore[attr-defined]
    blind = fit(loss_curves(context.sensitivity, []), [], [], [])
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (
        truth,
        [surrogate(context, 0).predict(x) for x in plans],
        [blind.predict(x) for x in plans],
    )]  # fmt: skip
    correlation = np.corrcoef(ranks)[0]
    assert correlation[1] > 0.999
    assert correlation[2] < 0.9
