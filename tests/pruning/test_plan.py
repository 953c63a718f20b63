"""Plans and grids: pure integers, closed cases."""

from __future__ import annotations

import json

import pytest

from pruning.architecture import Architecture
from pruning.plan import Grid, LayerPlan, Plan

# Costs by hand: attention 64 * (2 * 64 + 2 * 32) = 12,288, so 3,072 a KV group and, as every
# group has 2 query heads of 8, 2 * 64 * 8 * 4 = 4,096 for one query head of each group;
# a channel 3 * 64 = 192, so 1,536 a step of 8.
ARCHITECTURE = Architecture("llama", 2, 64, 8, 4, 8, 48, 120, False)
GRID = Grid.of(ARCHITECTURE, 8)


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
    "row",
    [[1, 2], [1, 2, 8, 1], [0, 2, 8], [1, -2, 8], [1, 2, 8.0], [True, 2, 8], ["1", 2, 8], 5, None],
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
