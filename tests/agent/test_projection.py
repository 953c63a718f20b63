"""Every projected plan is within the budget, tight and on the grid; nearest in closed cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent.projection import Space
from pruning.architecture import Architecture
from pruning.budget import Budget, BudgetKind, Times
from pruning.plan import AttentionUnit, Grid

FAMILIES = {
    "llama": Architecture("llama", 5, 96, 8, 8, 12, 256, 1000, False),
    "llama_biases": Architecture(
        "llama", 4, 96, 8, 4, 12, 250, 1000, False, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "mistral": Architecture("mistral", 6, 128, 16, 4, 8, 448, 1000, False),
    "qwen2": Architecture("qwen2", 3, 112, 14, 2, 8, 304, 1000, True, qkv_bias=True),
    "qwen3": Architecture("qwen3", 4, 64, 8, 2, 16, 192, 1000, True, qk_norm=True),
    "smollm2": Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True),
}


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    architecture = draw(st.sampled_from(list(FAMILIES.values())))
    unit: AttentionUnit = draw(st.sampled_from(["kv_group", "query_head"]))
    step = draw(st.sampled_from([8, 16, 30, 32, 64]))
    grid = Grid.of(architecture, step, unit, draw(st.booleans()))
    kinds: list[BudgetKind] = ["parameters", "macs", "bytes", "memory", "speedup"]
    kind, total = draw(st.sampled_from(kinds)), draw(st.booleans())
    share = draw(st.floats(0.05, 1.0))
    try:
        if kind == "speedup":
            steps = np.random.default_rng(draw(st.integers(0, 10**6)))
            attention, mlp = (
                tuple(np.cumsum(steps.integers(1, 50_000, len(x))).tolist())
                for x in (grid.attention, grid.mlp)
            )
            times = Times(draw(st.integers(0, 10**6)), attention, mlp)
            budget = Budget.timed(times, architecture.layers, 1 / share)
        elif kind == "memory" or total:
            fixed = architecture.fixed_parameters()
            parameters = fixed + share * architecture.block_parameters()
            asked = 2 * parameters if kind == "memory" else parameters
            kind = "memory" if kind == "memory" else "parameters"
            budget = Budget.of(architecture, grid, kind, asked)
        else:
            budget = Budget.of(architecture, grid, kind, share)
    except ValueError as error:
        assume("cannot be met" not in str(error))
        raise
    rates = sorted(draw(st.tuples(st.floats(0, 0.95), st.floats(0, 1))))
    return Space(grid, budget, rates[0] if draw(st.booleans()) else 0.0, rates[1])


def wishes(space: Space, seed: int, scale: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, scale, (space.layers, 2))


def check(space: Space, levels: list[tuple[int, int]]) -> None:
    assert len(levels) == space.layers
    assert all(0 <= a < len(space.grid.attention) for a, _ in levels)
    assert all(0 <= m < len(space.grid.mlp) for _, m in levels)
    assert space.budget.is_within(levels)
    assert space.budget.is_tight(levels)


@settings(max_examples=150, deadline=None)
@given(spaces(), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 5.0, 1e6]))
def test_any_wish_becomes_a_plan_within_and_tight(space: Space, seed: int, scale: float) -> None:
    levels = space.project(wishes(space, seed, scale))
    check(space, levels)
    assert space.grid.levels(space.grid.plan(levels)) == levels


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_an_allowed_plan_is_a_fixed_point(space: Space, seed: int) -> None:
    levels = space.project(wishes(space, seed, 0.3))
    if space.is_allowed(levels):
        assert space.project(space.shares(levels)) == levels
        assert space.settle(levels) == levels


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 10**6))
def test_settle_and_hold_keep_the_promise_too(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = [
        (int(rng.integers(len(space.grid.attention))), int(rng.integers(len(space.grid.mlp))))
        for _ in range(space.layers)
    ]
    check(space, space.settle(levels))
    check(space, space.one_rate(levels))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308, -1e308])
def test_insane_wishes_are_survived(value: float) -> None:
    architecture = FAMILIES["smollm2"]
    grid = Grid.of(architecture, 32)
    space = Space(grid, Budget.of(architecture, grid, "parameters", 0.7))
    wish = np.full((30, 2), 0.7)
    wish[3] = value
    check(space, space.project(wish))


def test_wrong_shape_is_refused() -> None:
    architecture = FAMILIES["qwen3"]
    grid = Grid.of(architecture, 32)
    space = Space(grid, Budget.of(architecture, grid, "parameters", 0.7))
    with pytest.raises(ValueError, match=r"got shape \(3, 2\), want \(4, 2\)"):
        space.project(np.ones((3, 2)))


def test_rates_hold_where_the_budget_allows() -> None:
    architecture = FAMILIES["smollm2"]
    grid = Grid.of(architecture, 32)
    space = Space(grid, Budget.of(architecture, grid, "parameters", 0.5), 0.2, 0.8)
    for seed in range(20):
        shares = space.shares(space.project(wishes(space, seed, 1.0)))
        assert shares.min() >= 0.2 - 1e-9
        assert shares.max() <= 0.8 + 1e-9


def test_the_budget_wins_over_the_rates() -> None:
    architecture = FAMILIES["smollm2"]
    grid = Grid.of(architecture, 32)
    strict = Space(grid, Budget.of(architecture, grid, "parameters", 0.3), 0.0, 0.2)
    check(strict, strict.project(np.ones((30, 2))))
    loose = Space(grid, Budget.of(architecture, grid, "parameters", 0.95), 0.5, 0.9)
    check(loose, loose.project(np.zeros((30, 2))))


def test_the_whole_budget_is_the_dense_plan() -> None:
    architecture = FAMILIES["mistral"]
    grid = Grid.of(architecture, 32)
    space = Space(grid, Budget.of(architecture, grid, "macs", 1.0))
    top = (len(grid.attention) - 1, len(grid.mlp) - 1)
    assert space.project(np.zeros((6, 2))) == [top] * 6


def test_without_attention_the_projection_is_the_nearest_plan() -> None:
    """Brute force over all tight plans of three layers of equal cost."""
    architecture = Architecture("llama", 3, 64, 4, 2, 16, 128, 100, True)
    grid = Grid.of(architecture, 16, prune_attention=False)
    space = Space(grid, Budget.of(architecture, grid, "parameters", 0.7), 0.0, 1.0)
    plans = [
        [(0, a), (0, b), (0, c)] for a, b, c in itertools.product(range(len(grid.mlp)), repeat=3)
    ]
    allowed = [x for x in plans if space.budget.is_within(x) and space.budget.is_tight(x)]
    assert len(allowed) > 10
    for seed in range(30):
        wish = np.random.default_rng(seed).uniform(0.3, 0.9, (3, 2))
        got = space.shares(space.project(wish))[:, 1]
        distance = {i: ((space.shares(x) - wish)[:, 1] ** 2).sum() for i, x in enumerate(allowed)}
        assert ((got - wish[:, 1]) ** 2).sum() == pytest.approx(min(distance.values()), abs=1e-12)


def test_attention_goes_deterministically_where_it_cannot_be_paid() -> None:
    architecture = FAMILIES["smollm2"]
    grid = Grid.of(architecture, 32)
    space = Space(grid, Budget.of(architecture, grid, "parameters", 0.2), 0.0, 0.9)
    wish = np.zeros((30, 2))
    wish[:, 0] = 1.0
    first = space.hold([2] * 30, wish[:, 1])
    check(space, first)
    assert first == space.hold([2] * 30, wish[:, 1])
    assert [a for a, _ in first] == sorted(a for a, _ in first)
