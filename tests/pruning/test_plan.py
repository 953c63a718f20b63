"""Plans, grids and budgets: pure integers, closed cases."""

from __future__ import annotations

import json

import pytest

from pruning.architecture import Architecture
from pruning.plan import Budget, Grid, LayerPlan, Plan

# Costs by hand: attention 64 * (2 * 64 + 2 * 32) = 12,288, so 3,072 a KV group and, as every
# group has 2 query heads of 8, 2 * 64 * 8 * 4 = 4,096 for one query head of each group;
# a channel 3 * 64 = 192, so 1,536 a step of 8.
ARCHITECTURE = Architecture("llama", 2, 64, 8, 4, 8, 48, 120, False)
GRID = Grid.of(ARCHITECTURE, 8)
BLOCKS = 2 * (12_288 + 48 * 192)


def test_json_round_trip() -> None:
    plan = Plan((LayerPlan(1, 2, 8), LayerPlan(4, 2, 48)))
    rows = json.loads(json.dumps(plan.to_json()))
    assert rows == [[1, 2, 8], [4, 2, 48]]
    assert Plan.from_json(rows) == plan
    assert hash(Plan.from_json(rows)) == hash(plan)


def test_key_is_stable() -> None:
    """Keys are on disk: a change of this value orphans every ledger."""
    plan = Plan.from_json([[1, 2, 8], [4, 2, 48]])
    assert plan.key == "439beb5fd694aa49"
    assert plan.key == Plan.from_json([[1, 2, 8], [4, 2, 48]]).key
    assert plan.key != Plan.from_json([[4, 2, 48], [1, 2, 8]]).key


@pytest.mark.parametrize(
    "row", [[1, 2], [1, 2, 8, 1], [0, 2, 8], [1, -2, 8], [1, 2, 8.0], [True, 2, 8], ["1", 2, 8]]
)
def test_damaged_rows_are_refused(row: list[object]) -> None:
    with pytest.raises(ValueError, match=r"^plan, layer 1: got .*, want three integers >= 1$"):
        Plan.from_json([[1, 2, 8], row])


def test_uniform() -> None:
    assert Plan.from_json([[1, 2, 8]] * 3).is_uniform
    assert not Plan.from_json([[1, 2, 8], [1, 2, 16]]).is_uniform
    assert Plan.dense(ARCHITECTURE) == Plan.from_json([[4, 2, 48]] * 2)


def test_grid_of_kv_groups() -> None:
    assert GRID.attention == (1, 2, 3, 4)
    assert GRID.mlp == (8, 16, 24, 32, 40, 48)
    assert GRID.layer(1, 2) == LayerPlan(2, 2, 24)


def test_grid_of_query_heads() -> None:
    grid = Grid.of(ARCHITECTURE, 8, "query_head")
    assert grid.attention == (1, 2)
    assert grid.layer(0, 0) == LayerPlan(4, 1, 8)


def test_last_step_may_be_shorter() -> None:
    assert Grid.of(ARCHITECTURE, 20).mlp == (20, 40, 48)
    assert Grid.of(ARCHITECTURE, 48).mlp == (48,)


def test_attention_may_be_left_alone() -> None:
    assert Grid.of(ARCHITECTURE, 8, prune_attention=False).attention == (4,)


@pytest.mark.parametrize("step", [0, -8, 49])
def test_bad_steps_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"^pruning\.step: got {step}, allowed 1 to 48$"):
        Grid.of(ARCHITECTURE, step)


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_levels_and_plans_are_one_to_one(unit: str) -> None:
    grid = Grid.of(ARCHITECTURE, 20, unit)  # type: ignore[arg-type]
    pairs = [(a, m) for a in range(len(grid.attention)) for m in range(len(grid.mlp))]
    for first in pairs:
        levels = [first, pairs[-1]]
        assert grid.levels(grid.plan(levels)) == levels
    assert len({grid.plan([pair]) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("row", [[5, 2, 8], [4, 2, 9]])
def test_plans_off_the_grid_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^plan, layer 1: .* is not on the grid$"):
        GRID.levels(Plan.from_json([[4, 2, 48], row]))


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
        ("parameters", 100.0, r"budget\.parameters: 100 cannot be met; .* keeps 0.2143 .*"),
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
