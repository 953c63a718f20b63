"""The knapsack: against brute force, at the size of real models, with costs of any kind."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import allocators, knapsack
from agent.projection import Floats, Levels, Space
from pruning.architecture import Architecture
from pruning.budget import Budget, BudgetKind, Times
from pruning.plan import Grid

SMOLLM = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)
LARGE = Architecture("llama", 80, 8192, 64, 8, 128, 28672, 128256, False)
TINY = Architecture("llama", 4, 64, 4, 2, 16, 128, 100, True)

Table = list[list[list[float]]]


def space_of(
    architecture: Architecture,
    target: float,
    step: int = 32,
    kind: BudgetKind = "parameters",
    **rates: float,
) -> Space:
    grid = Grid.of(architecture, step)
    return Space(grid, Budget.of(architecture, grid, kind, target), **rates)


def falling(space: Space, seed: int) -> Table:
    """Return losses that fall as more is kept, 0 for the dense block, wild in between."""
    rng = np.random.default_rng(seed)

    def block(kept: Floats) -> list[float]:
        steps = rng.exponential(size=len(kept) - 1) * rng.exponential()
        return [*np.cumsum(steps)[::-1].tolist(), 0.0]

    return [[block(kept) for kept in space.kept] for _ in range(space.layers)]


def total(table: Table, levels: Levels | tuple[tuple[int, int], ...]) -> float:
    return sum(table[i][0][a] + table[i][1][m] for i, (a, m) in enumerate(levels))


@pytest.mark.parametrize("kind", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("target", [0.45, 0.6, 0.8, 1.0])
def test_no_plan_within_the_budget_loses_less(kind: BudgetKind, target: float) -> None:
    space = space_of(TINY, target, kind=kind, max_rate=1.0)
    pairs = list(itertools.product(*(range(len(kept)) for kept in space.kept)))
    plans = [x for x in itertools.product(pairs, repeat=4) if space.budget.is_within(x)]
    for seed in range(8):
        table = falling(space, seed)
        found = knapsack.knapsack(space, table)
        assert space.budget.is_within(found)
        assert space.budget.is_tight(found)
        assert total(table, found) == pytest.approx(min(total(table, x) for x in plans))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.15, 1), st.floats(0, 0.5), st.floats(0.5, 1), st.integers(0, 1000))
def test_every_plan_is_within_tight_and_no_worse_than_the_greedy_one(
    target: float, min_rate: float, max_rate: float, seed: int
) -> None:
    space = space_of(SMOLLM, target, min_rate=min_rate, max_rate=max_rate)
    table = falling(space, seed)
    found = knapsack.knapsack(space, table)
    assert space.budget.is_within(found)
    assert space.budget.is_tight(found)
    greedy = allocators.heuristic(space, table)
    if space.is_allowed(greedy):
        assert total(table, found) <= total(table, greedy) + 1e-9


@pytest.mark.parametrize("target", [1.0, 1.3, 1.8])
def test_no_plan_of_that_speed_loses_less(target: float) -> None:
    """Times of no common unit: none that leaves a bin a block, of 20,000, is better."""
    grid = Grid.of(TINY, 32)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows = [
            tuple(np.cumsum(rng.integers(1_000, 900_000, len(x))).tolist())
            for x in (grid.attention, grid.mlp)
        ]
        times = Times(int(rng.integers(0, 500_000)), rows[0], rows[1])
        space = Space(grid, Budget.timed(times, TINY.layers, target), max_rate=1.0)
        pairs = list(itertools.product(*(range(len(kept)) for kept in space.kept)))
        limit = space.budget.limit * (1 - 8 / 20_000)
        plans = [x for x in itertools.product(pairs, repeat=4) if space.budget.cost(x) <= limit]
        table = falling(space, seed)
        found = knapsack.knapsack(space, table)
        assert space.budget.is_within(found)
        assert space.budget.is_tight(found)
        assert space.budget.achieved(found) >= target - 1e-9
        assert total(table, found) <= min(total(table, x) for x in plans) + 1e-9


def test_costs_without_a_common_unit_are_binned_and_stay_within() -> None:
    space = space_of(SMOLLM, 0.7)
    rng = np.random.default_rng(0)

    def uneven(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(x * f for x in row) for row, f in zip(rows, factors, strict=True))

    factors = rng.uniform(0.9, 1.1, space.layers).tolist()
    budget = space.budget
    odd = replace(budget, attention=uneven(budget.attention), mlp=uneven(budget.mlp))
    for seed in range(5):
        table = falling(space, seed)
        found = knapsack.knapsack(replace(space, budget=odd), table)
        assert odd.is_within(found)
        assert odd.is_tight(found)
        greedy = allocators.heuristic(replace(space, budget=odd), table)
        assert total(table, found) <= total(table, greedy) + 1e-9


def test_losses_that_are_not_finite_are_avoided() -> None:
    space = space_of(SMOLLM, 0.7)
    table = falling(space, 3)
    table[4][1][:20] = [float("nan")] * 20
    table[5][0][0] = float("inf")
    found = knapsack.knapsack(space, table)
    assert found[4][1] >= 20
    assert found[5][0] > 0


@pytest.mark.parametrize(("architecture", "step", "limit"), [(SMOLLM, 32, 2.0), (LARGE, 256, 20.0)])
def test_it_is_quick_at_the_size_of_real_models(
    architecture: Architecture, step: int, limit: float
) -> None:
    space = space_of(architecture, 0.7, step)
    table = falling(space, 0)
    start = time.process_time()
    knapsack.knapsack(space, table)
    assert time.process_time() - start < limit
