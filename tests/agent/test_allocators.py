"""Allocators without a search: within, tight, and best where that can be counted out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import allocators
from agent.projection import Space
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid

SMOLLM = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)


def space_of(architecture: Architecture, target: float, step: int = 32, **rates: float) -> Space:
    grid = Grid.of(architecture, step)
    return Space(grid, Budget.of(architecture, grid, "parameters", target), **rates)


def errors(space: Space, seed: int, *, wild: bool = False) -> list[list[list[float]]]:
    rng = np.random.default_rng(seed)
    table = []
    for _ in range(space.layers):
        row = [(rng.exponential() * (1 - kept) ** 2) for kept in space.kept]
        if wild:
            row = [x * rng.uniform(-1, 2, x.shape) for x in row]
            row[1][rng.integers(len(row[1]))] = rng.choice([np.nan, np.inf, -np.inf])
        table.append([x.tolist() for x in row])
    return table


def unit_scores(space: Space, seed: int) -> list[list[list[float]]]:
    """Return standard scores of the units of every block, in rank order."""
    rng = np.random.default_rng(seed)
    counts = (space.grid.dense.kv_groups, space.grid.dense.mlp_channels)
    draws = [[rng.exponential(size=n) for n in counts] for _ in range(space.layers)]
    return [[sorted((x - x.mean()) / x.std(), reverse=True) for x in row] for row in draws]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.15, 1.0),
    st.floats(0, 0.5),
    st.floats(0.5, 1),
    st.integers(0, 1000),
    st.booleans(),
)
def test_all_are_within_and_tight(
    target: float, min_rate: float, max_rate: float, seed: int, wild: bool
) -> None:
    space = space_of(SMOLLM, target, min_rate=min_rate, max_rate=max_rate)
    for levels in (
        allocators.uniform(space),
        allocators.uniform_mlp(space),
        allocators.heuristic(space, errors(space, seed, wild=wild)),
        allocators.owl(space, np.random.default_rng(seed).exponential(size=space.layers).tolist()),
        allocators.flap_global(space, unit_scores(space, seed)),
    ):
        assert space.budget.is_within(levels)
        assert space.budget.is_tight(levels)


def test_uniform_is_uniform_up_to_one_step() -> None:
    space = space_of(Architecture("llama", 4, 64, 8, 8, 8, 320, 100, True), 0.5)
    attention, mlp = zip(*allocators.uniform(space), strict=True)
    assert set(attention) == {3}
    assert max(mlp) - min(mlp) <= 1


def test_uniform_mlp_keeps_attention() -> None:
    space = space_of(SMOLLM, 0.7)
    attention, mlp = zip(*allocators.uniform_mlp(space), strict=True)
    assert set(attention) == {2}
    assert max(mlp) - min(mlp) <= 1


def test_heuristic_respects_the_rates() -> None:
    space = space_of(SMOLLM, 0.6, min_rate=0.1, max_rate=0.7)
    levels = allocators.heuristic(space, errors(space, 0))
    assert space.is_allowed(levels)


def test_heuristic_is_near_the_best_of_all_plans() -> None:
    """Against brute force over every plan of three small layers."""
    space = space_of(Architecture("llama", 3, 64, 4, 2, 16, 128, 100, True), 0.6, 32)
    pairs = list(itertools.product(range(2), range(len(space.grid.mlp))))
    plans = [x for x in itertools.product(pairs, repeat=3) if space.budget.is_within(x)]
    gaps = []
    for seed in range(40):
        table = errors(space, seed)

        def total(
            levels: tuple[tuple[int, int], ...], table: list[list[list[float]]] = table
        ) -> float:
            return sum(table[i][0][a] + table[i][1][m] for i, (a, m) in enumerate(levels))

        best = min(map(total, plans))
        got = total(tuple(allocators.heuristic(space, table)))
        assert got >= best - 1e-12
        even = total(tuple(allocators.uniform(space)))
        gaps.append((got - best) / (even - best + 1e-12))
    assert np.mean(gaps) < 0.25


def test_a_cheap_coarse_attention_unit_is_cut_before_dear_mlp_steps() -> None:
    """The first attention level alone is dear, both together are cheap: look-ahead finds them."""
    space = space_of(Architecture("llama", 2, 64, 3, 3, 32, 128, 100, True), 0.75, 16)
    mlp = [10.0 * (1 - x) for x in space.kept[1]]
    levels = allocators.heuristic(space, [[[0.1, 5.0, 0.0], mlp], [[50.0, 40.0, 0.0], mlp]])
    assert levels[0][0] == 0
    assert levels[1][0] == 2


def test_broken_sensitivity_is_refused_by_shape() -> None:
    space = space_of(SMOLLM, 0.7)
    with pytest.raises((IndexError, ValueError)):
        allocators.heuristic(space, [[[0.0], [0.0]]] * 30)


def test_owl_keeps_more_where_outliers_are_and_stays_within_lambda() -> None:
    space = space_of(Architecture("llama", 4, 64, 8, 8, 8, 4096, 100, True), 0.6, step=1)
    outliers = [5.0, 1.0, 3.0, 1.0]
    kept = space.shares(allocators.owl(space, outliers))[:, 1]
    scaled = np.array([0.16, 0.0, 0.08, 0.0])
    assert kept == pytest.approx(0.6 + scaled - scaled.mean(), abs=0.02)
    assert allocators.owl(space, [2.0] * 4) == allocators.uniform(space)


def test_flap_takes_the_units_of_lowest_score_whatever_their_layer() -> None:
    """Two layers; all of one layer's channels score below the other's."""
    space = space_of(Architecture("llama", 2, 64, 4, 4, 16, 64, 100, True), 0.8125, step=8)
    high, low = np.linspace(2, 1, 64).tolist(), np.linspace(-1, -2, 64).tolist()
    heads = [3.0, 3.0, 3.0, 3.0]
    first, second = allocators.flap_global(space, [[heads, high], [heads, low]])
    assert (first, second) == ((3, 7), (3, 0))


def test_flap_weighs_a_group_by_what_it_costs() -> None:
    """With grouped queries a unit is larger than a head: the budget knows, no constant does."""
    architecture = Architecture("llama", 2, 64, 8, 2, 8, 64, 100, True)
    space = space_of(architecture, 0.7, step=8)
    scores = [[[0.5, -3.0], np.linspace(2, -1, 64).tolist()]] * 2
    plan = allocators.flap_global(space, scores)
    assert [a for a, _ in plan] == [0, 0]
    assert space.budget.is_within(plan)
    assert space.budget.is_tight(plan)
