"""Budgets of every kind: closed cases by hand, and what holds for any plan."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pruning.architecture import Architecture
from pruning.budget import Budget, BudgetKind, Times
from pruning.plan import AttentionUnit, Grid, Plan

# Costs by hand: attention 64 * (2 * 64 + 2 * 32) = 12,288, so 3,072 a KV group and, as every
# group has 2 query heads of 8, 2 * 64 * 8 * 4 = 4,096 for one query head of each group;
# a channel 3 * 64 = 192, so 1,536 a step of 8.
ARCHITECTURE = Architecture("llama", 2, 64, 8, 4, 8, 48, 120, False)
GRID = Grid.of(ARCHITECTURE, 8)
BLOCKS = 2 * (12_288 + 48 * 192)
TIMES = Times(1000, (100, 200, 300, 400), (50, 100, 150, 200, 250, 300))  # dense 2,400


def test_parameter_table() -> None:
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", 0.5)
    assert budget.attention == ((3072, 6144, 9216, 12_288),) * 2
    assert budget.mlp == ((1536, 3072, 4608, 6144, 7680, 9216),) * 2
    assert (budget.dense, budget.limit) == (BLOCKS, BLOCKS / 2)


def test_parameter_table_counts_qkv_biases() -> None:
    biased = Architecture("qwen2", 2, 64, 8, 4, 8, 48, 120, False, qkv_bias=True)
    budget = Budget.of(biased, GRID, "parameters", 0.5)
    assert budget.attention[0] == tuple(g * (3072 + 8 * 2 + 8 * 2) for g in (1, 2, 3, 4))


def test_byte_table_is_the_parameter_table_times_width() -> None:
    parameters = Budget.of(ARCHITECTURE, GRID, "parameters", 0.5)
    for width in (2, 4):
        table = Budget.of(ARCHITECTURE, GRID, "bytes", 0.5, bytes_per_weight=width)
        assert table.attention[0] == tuple(width * x for x in parameters.attention[0])
        assert table.mlp[0] == tuple(width * x for x in parameters.mlp[0])
        assert table.limit == width * parameters.limit


def test_mac_table() -> None:
    """Ten tokens: every weight once a token; 2 heads of 8 a group in scores and weighted sum."""
    budget = Budget.of(ARCHITECTURE, GRID, "macs", 0.5, tokens=10)
    assert budget.attention[0] == tuple(g * (10 * 3072 + 2 * 16 * 100) for g in (1, 2, 3, 4))
    assert budget.mlp[0] == tuple(10 * 1536 * step for step in range(1, 7))


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_cost_is_what_the_architecture_counts(unit: str) -> None:
    grid = Grid.of(ARCHITECTURE, 20, unit)  # type: ignore[arg-type]
    budget = Budget.of(ARCHITECTURE, grid, "parameters", 0.9)
    for levels in ([(0, 0), (1, 2)], [(1, 1), (0, 2)]):
        plan = grid.plan(levels)
        assert budget.cost(levels) == ARCHITECTURE.block_parameters(plan)
        assert budget.achieved(levels) == ARCHITECTURE.block_parameters(plan) / BLOCKS


def test_totals_count_what_is_never_pruned() -> None:
    total = ARCHITECTURE.total_parameters() - 5000
    plain = Budget.of(ARCHITECTURE, GRID, "parameters", total)
    assert plain.limit == BLOCKS - 5000
    with_biases = Budget.of(ARCHITECTURE, GRID, "parameters", total, correction_biases=True)
    assert with_biases.limit == BLOCKS - 5000 - 2 * 2 * 64


def test_within_and_tight() -> None:
    """The limit leaves exactly two MLP steps out: level 5 in one layer, 3 in the other."""
    share = (BLOCKS - 2 * 1536) / BLOCKS
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", share)
    exact = [(3, 5), (3, 3)]
    assert budget.cost(exact) == pytest.approx(budget.limit, abs=1e-6)
    total = ARCHITECTURE.total_parameters() - 2 * 1536
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", total)
    assert budget.is_within(exact)
    assert budget.is_tight(exact)
    assert not budget.is_within([(3, 5), (3, 4)])
    assert budget.is_within([(3, 4), (3, 3)])
    assert not budget.is_tight([(3, 4), (3, 3)])


def test_tight_counts_mlp_steps_only() -> None:
    """All MLPs full: tight, though a KV group of twice a step's cost is still out."""
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", 1.0)
    assert budget.is_tight([(2, 5), (3, 5)])
    assert budget.is_within([(3, 5), (3, 5)])


def test_uneven_last_step() -> None:
    """Spare for the short last step (8 channels) but not for a full one (20)."""
    grid = Grid.of(ARCHITECTURE, 20)
    total = ARCHITECTURE.total_parameters() - 20 * 192
    budget = Budget.of(ARCHITECTURE, grid, "parameters", total)
    assert budget.is_tight([(3, 2), (3, 0)])
    assert not budget.is_tight([(3, 1), (3, 0)])


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("parameters", 0.0, r"budget\.parameters: got 0.0, want a share \(0, 1\] or a total"),
        ("macs", -1.0, r"budget\.macs: got -1.0, want a share \(0, 1\] or a total"),
        ("macs", 2.0, r"budget\.macs: got 2.0, only shares up to 1 are allowed"),
        ("bytes", 1e9, r"budget\.bytes: got 1000000000.0, only shares up to 1 are allowed"),
        ("parameters", 0.2, r"budget\.parameters: 0.2 cannot be met; .* keeps 0.2143 .*"),
        ("parameters", 100.0, r"budget\.parameters: 100 cannot be met; .* has 24896 parameters"),
    ],
)
def test_impossible_budgets_are_refused(kind: str, target: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Budget.of(ARCHITECTURE, GRID, kind, target)  # type: ignore[arg-type]


def test_the_smallest_plan_is_allowed_exactly() -> None:
    smallest = ARCHITECTURE.total_parameters() - BLOCKS + 2 * (3072 + 1536)
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", smallest)
    assert budget.is_within([(0, 0), (0, 0)])
    assert budget.is_tight([(0, 0), (0, 0)])
    with pytest.raises(ValueError, match="cannot be met"):
        Budget.of(ARCHITECTURE, GRID, "parameters", smallest - 1)


def test_totals_are_achieved_as_totals() -> None:
    total = ARCHITECTURE.total_parameters() - 5000
    budget = Budget.of(ARCHITECTURE, GRID, "parameters", total, correction_biases=True)
    levels = [(3, 2), (1, 4)]
    assert budget.achieved(levels) == ARCHITECTURE.total_parameters(GRID.plan(levels), True)


def test_memory_is_all_weights() -> None:
    budget = Budget.of(ARCHITECTURE, GRID, "memory", 100_000, bytes_per_weight=2)
    assert budget.fixed == 2 * ARCHITECTURE.fixed_parameters()
    assert budget.mlp[0][0] == 2 * 1536
    for levels in ([(0, 0), (3, 5)], [(2, 1), (0, 4)]):
        plan = GRID.plan(levels)
        assert budget.achieved(levels) == 2 * ARCHITECTURE.total_parameters(plan)
        assert budget.is_within(levels) == (2 * ARCHITECTURE.total_parameters(plan) <= 100_000)


def test_memory_has_room_for_the_cache_where_asked() -> None:
    """Three sequences of ten tokens: a key and a value of 8 numbers of 2 bytes a KV group."""
    plain = Budget.of(ARCHITECTURE, GRID, "memory", 1e6)
    with_cache = Budget.of(ARCHITECTURE, GRID, "memory", 1e6, cached_tokens=30)
    for groups in (1, 2, 3, 4):
        extra = with_cache.attention[0][groups - 1] - plain.attention[0][groups - 1]
        assert extra == 30 * groups * 2 * 8 * 2
    assert with_cache.mlp == plain.mlp


def test_the_cache_of_query_heads_is_always_whole() -> None:
    grid = Grid.of(ARCHITECTURE, 8, "query_head")
    with_cache = Budget.of(ARCHITECTURE, grid, "memory", 1e6, cached_tokens=30)
    plain = Budget.of(ARCHITECTURE, grid, "memory", 1e6)
    extras = {a - b for a, b in zip(with_cache.attention[0], plain.attention[0], strict=True)}
    assert extras == {30 * 4 * 2 * 8 * 2}


def test_speedup_table() -> None:
    """Dense 1000 + 2 * (400 + 300) = 2400 ns; 1.5 times as fast is 1600, so 600 for the blocks."""
    budget = Budget.timed(TIMES, 2, 1.5)
    assert (budget.dense, budget.fixed, budget.limit) == (1400, 1000, pytest.approx(600))
    assert budget.achieved([(3, 5), (3, 5)]) == 1.0
    assert budget.achieved([(0, 0), (0, 0)]) == 2400 / 1300
    assert budget.is_within([(0, 3), (1, 1)])  # 100 + 200 + 200 + 100
    assert budget.is_tight([(0, 3), (1, 1)])
    assert not budget.is_within([(0, 3), (1, 2)])


def test_another_target_is_the_same_table() -> None:
    for budget, target in (
        (Budget.timed(TIMES, 2, 1.5), 1.2),
        (Budget.of(ARCHITECTURE, GRID, "macs", 0.5), 0.8),
    ):
        there = budget.at(target)
        assert (there.attention, there.mlp, there.target) == (budget.attention, budget.mlp, target)
    assert Budget.timed(TIMES, 2, 1.5).at(1.2) == Budget.timed(TIMES, 2, 1.2)
    assert Budget.of(ARCHITECTURE, GRID, "macs", 0.5).at(0.8) == Budget.of(
        ARCHITECTURE, GRID, "macs", 0.8
    )
    total = ARCHITECTURE.total_parameters() - 5000
    with pytest.raises(ValueError, match=r"^budget\.parameters: .* is no share of the blocks$"):
        Budget.of(ARCHITECTURE, GRID, "parameters", total).at(0.8)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0.9, r"budget\.speedup: got 0.9, want at least 1"),
        (2.0, r"budget\.speedup: 2 cannot be met; .* predicted to be 1.8462 times as fast"),
    ],
)
def test_impossible_speedups_are_refused(target: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Budget.timed(TIMES, 2, target)


def test_times_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the times of mlp levels do not rise"):
        Budget.timed(Times(0, (1, 2), (3, 3, 4)), 2, 1.0)
    with pytest.raises(ValueError, match=r"needs predicted times"):
        Budget.of(ARCHITECTURE, GRID, "speedup", 1.5)


def test_impossible_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^budget\.memory: 10 cannot .* has 49\d{3} bytes$"):
        Budget.of(ARCHITECTURE, GRID, "memory", 10)


ARCHITECTURES = (
    ARCHITECTURE,
    Architecture("llama", 5, 96, 8, 8, 12, 256, 1000, False),
    Architecture("qwen2", 3, 112, 14, 2, 8, 304, 1000, True, qkv_bias=True),
    Architecture("qwen3", 4, 64, 8, 2, 16, 192, 1000, True, qk_norm=True),
    Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True),
)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Architecture, Grid, Budget]:
    """Any grid and a budget of any kind on it that can be met."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    unit: AttentionUnit = draw(st.sampled_from(["kv_group", "query_head"]))
    grid = Grid.of(architecture, draw(st.sampled_from([8, 20, 30, 48])), unit, draw(st.booleans()))
    kind = draw(st.sampled_from([*get_args(BudgetKind), "total"]))
    share = draw(st.floats(0.05, 1.0))
    try:
        if kind == "speedup":
            steps = st.integers(1, 10**7)
            rows = [
                tuple(itertools.accumulate(draw(steps) for _ in levels))
                for levels in (grid.attention, grid.mlp)
            ]
            times = Times(draw(st.integers(0, 10**7)), rows[0], rows[1])
            return architecture, grid, Budget.timed(times, architecture.layers, 1 / share)
        if kind == "memory":
            cached = draw(st.integers(0, 8192))
            budget = Budget.of(architecture, grid, "memory", 1e12, cached_tokens=cached)
            target = budget.fixed + share * budget.dense
            budget = Budget.of(architecture, grid, "memory", target, cached_tokens=cached)
            return architecture, grid, budget
        if kind == "total":
            total = architecture.fixed_parameters() + share * architecture.block_parameters()
            return architecture, grid, Budget.of(architecture, grid, "parameters", total)
        return architecture, grid, Budget.of(architecture, grid, kind, share)
    except ValueError as error:
        assume("cannot be met" not in str(error))
        raise


def _levels(draw: st.DrawFn, architecture: Architecture, grid: Grid) -> list[tuple[int, int]]:
    attention = st.integers(0, len(grid.attention) - 1)
    mlp = st.integers(0, len(grid.mlp) - 1)
    return [(draw(attention), draw(mlp)) for _ in range(architecture.layers)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_within_is_reaching_the_target(data: st.DataObject) -> None:
    """A plan is within exactly where it achieves what was asked, in the unit of the target."""
    architecture, grid, budget = data.draw(budgets())
    levels = _levels(data.draw, architecture, grid)
    achieved = budget.achieved(levels)
    if math.isclose(achieved, budget.target, rel_tol=1e-9):
        return
    reaches = achieved > budget.target if budget.kind == "speedup" else achieved < budget.target
    assert budget.is_within(levels) == reaches


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tight_is_that_no_wider_mlp_is_within(data: st.DataObject) -> None:
    architecture, grid, budget = data.draw(budgets())
    levels = _levels(data.draw, architecture, grid)
    if not budget.is_within(levels):
        return
    wider = []
    for layer, (attention, mlp) in enumerate(levels):
        if mlp + 1 < len(grid.mlp):
            wider.append([*levels[:layer], (attention, mlp + 1), *levels[layer + 1 :]])
    spares = [budget.limit - budget.cost(x) for x in wider]
    assume(all(abs(x) > 1e-6 * budget.dense for x in spares))
    assert budget.is_tight(levels) == all(x < 0 for x in spares)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dense_achieves_dense_and_less_costs_less(data: st.DataObject) -> None:
    architecture, grid, budget = data.draw(budgets())
    top = [(len(grid.attention) - 1, len(grid.mlp) - 1)] * architecture.layers
    whole = {
        "memory": lambda: budget.fixed + budget.dense,
        "parameters": lambda: budget.fixed + budget.dense if budget.fixed else 1.0,
    }.get(budget.kind, lambda: 1.0)()
    assert budget.achieved(top) == pytest.approx(whole)
    levels = _levels(data.draw, architecture, grid)
    if levels != top:
        assert budget.cost(levels) < budget.dense
    assert Plan.dense(architecture) == grid.plan(top)
