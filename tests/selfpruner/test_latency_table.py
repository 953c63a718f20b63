"""The latency table: sums by hand, an additive machine found again, levels without use left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget import Budget
from pruning.plan import Grid, LayerPlan, Plan
from selfpruner.latency_table import LatencyTable, Workload, believed, rising

DENSE = LayerPlan(4, 2, 64)
GRID = Grid("kv_group", (1, 2, 3, 4), tuple(range(8, 65, 8)), DENSE)
LAYERS = 3
DECODE = Workload("decode", 2, 128)


def machine(plan: Plan) -> float:
    """A machine that takes 5 ms, 2 a KV group and 0.25 a channel."""
    return 5 + sum(2 * x.kv_groups + 0.25 * x.mlp_channels for x in plan.layers)


def table_of(
    attention: dict[int, float] | None = None, mlp: dict[int, float] | None = None
) -> LatencyTable:
    top = LAYERS * (8 + 16) + 5
    by_groups = {k: top - LAYERS * 2 * (4 - k) for k in (1, 2, 4)}
    by_channels = {k: top - LAYERS * 0.25 * (64 - k) for k in (8, 32, 64)}
    measured = attention or by_groups, mlp or by_channels
    return LatencyTable.of_models(DECODE, "kv_group", DENSE, LAYERS, *measured)


def plans() -> list[Plan]:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, (4, 8), (20, LAYERS, 2)).tolist()
    return [GRID.plan([(a, m) for a, m in x]) for x in pairs]


def test_an_additive_machine_is_found_again() -> None:
    """Times of whole models, widths in between included: base, blocks and every sum."""
    table = table_of()
    assert table.base == pytest.approx(5)
    assert table.attention == ((1, pytest.approx(2)), (2, pytest.approx(4)), (4, pytest.approx(8)))
    for plan in plans():
        assert table.milliseconds(plan) == pytest.approx(machine(plan))
        dense = machine(Plan((DENSE,) * LAYERS))
        assert table.speedup(plan) == pytest.approx(dense / machine(plan))
    assert table.per_unit(GRID) == (pytest.approx(2000), pytest.approx(2000))


def test_calibration_puts_a_common_error_right() -> None:
    """Whole models that take 3 ms and a fifth more than the sum of their parts."""
    few = plans()[:4]
    table = table_of().calibrated(few, [3 + 1.2 * machine(x) for x in few])
    assert (table.offset, table.slope) == (pytest.approx(3), pytest.approx(1.2))
    for plan in plans():
        assert table.milliseconds(plan) == pytest.approx(3 + 1.2 * machine(plan))
    # A budget sees the calibrated times: its cost and its fixed part are nanoseconds of them.
    budget = Budget.timed(table.times(GRID), LAYERS, 1.2)
    for plan in plans():
        levels = GRID.levels(plan)
        predicted = 1e6 * table.milliseconds(plan)
        assert budget.cost(levels) + budget.fixed == pytest.approx(predicted, abs=2 * LAYERS)
        assert budget.achieved(levels) == pytest.approx(table.speedup(plan), rel=1e-6)


def test_a_falling_calibration_is_flat() -> None:
    few = plans()[:4]
    table = table_of().calibrated(few, [1000 - machine(x) for x in few])
    assert table.slope == 0
    assert table.speedup(few[0]) == 1
    assert table.worthwhile(GRID) == GRID.keeping([3], [7])
    with pytest.raises(ValueError, match="predicted to take no time"):
        Budget.timed(table.times(table.worthwhile(GRID)), LAYERS, 1.0)


def test_widths_that_bring_no_speed_are_left_out() -> None:
    """Steps of 16 in time: 8 is as slow as 16, 24 as 32 ... so only multiples of 16 are of use."""
    stairs = {k: 77 - LAYERS * 0.25 * (64 - 16 * math.ceil(k / 16)) for k in GRID.mlp}
    table = table_of(mlp=stairs)
    kept = table.worthwhile(GRID)
    assert kept.mlp == (16, 32, 48, 64)
    assert kept.attention == GRID.attention
    assert kept.mlp_step == 16
    times = table.times(kept)
    assert list(times.mlp) == sorted(set(times.mlp))


def test_times_are_made_to_rise() -> None:
    """A level measured slower than a wider one is as slow as it, on average."""
    table = table_of(attention={1: 70.0, 2: 74.0, 3: 72.0, 4: 77.0})
    assert [1000 * t for _, t in table.attention] == sorted(1000 * t for _, t in table.attention)
    assert table.attention[1][1] == table.attention[2][1]
    assert table.worthwhile(GRID).attention == (1, 3, 4)
    assert table.milliseconds(Plan((DENSE,) * LAYERS)) == pytest.approx(77)


def test_steps_within_the_noise_are_not_believed() -> None:
    """Off the line by -2, +4, -2: within 3 of noise only the middle one stands out, by 1."""
    assert believed([1, 2, 3], [9.0, 17.0, 13.0], 0.0).tolist() == pytest.approx([9, 17, 13])
    assert believed([1, 2, 3], [9.0, 17.0, 13.0], 3.0).tolist() == pytest.approx([11, 14, 15])
    assert believed([1, 2, 3], [9.0, 17.0, 13.0], 9.0).tolist() == pytest.approx([11, 13, 15])
    assert believed([5], [9.0], 1.0).tolist() == [9]
    stairs = {k: 77 - LAYERS * 0.25 * (64 - 16 * math.ceil(k / 16)) for k in GRID.mlp}
    noisy = LatencyTable.of_models(
        DECODE, "kv_group", DENSE, LAYERS, {1: 59.0, 4: 77.0}, stairs, noise=6.0
    )
    assert noisy.worthwhile(GRID) == GRID


def test_query_heads_are_counted_where_they_are_the_unit() -> None:
    table = LatencyTable.of_models(
        DECODE, "query_head", DENSE, LAYERS, {1: 65.0, 2: 77.0}, {8: 35.0, 64: 77.0}
    )
    assert table.milliseconds(Plan((LayerPlan(4, 1, 64),) * LAYERS)) == pytest.approx(65)


def test_json_round_trip() -> None:
    table = table_of().calibrated(plans()[:3], [1.0, 2.0, 4.0]).with_repeatability(0.03)
    again = LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.milliseconds(plans()[5]) == table.milliseconds(plans()[5])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_rising_is_the_nearest_rising_curve(values: list[float]) -> None:
    """It rises, keeps the mean, and no other rising curve tried is nearer."""
    found = rising(values)
    assert (np.diff(found) >= -1e-9).all()
    assert found.mean() == pytest.approx(np.mean(values), abs=1e-9)
    distance = np.square(found - values).sum()
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = np.sort(found + rng.normal(0, 1 + found.std(), len(values)))
        assert distance <= np.square(other - values).sum() + 1e-6
    if values == sorted(values):
        assert found.tolist() == pytest.approx(values)


def test_a_table_of_a_busy_machine_predicts_no_time_below_zero() -> None:
    """Both smallest models happened to be timed at a tenth of the dense one."""
    table = table_of(attention={1: 10.0, 4: 100.0}, mlp={8: 10.0, 64: 100.0})
    smallest = GRID.plan([(0, 0)] * LAYERS)
    assert table.sum(smallest) < 0
    assert table.milliseconds(smallest) == pytest.approx(1.0)
    assert table.speedup(smallest) == pytest.approx(100)
