"""How channels fold into units, and the order in which they then stand."""

from __future__ import annotations

import pytest
import torch

from pruning.architecture import Architecture
from pruning.elastic_layer import Recipe
from pruning.ranking import UnitScores, head_rows, order_of
from pruning.units import Units

ARCHITECTURE = Architecture("llama", 1, 64, 6, 2, 4, 10, 100, False)


def test_units_of_an_architecture() -> None:
    """Two groups of three heads of four channels."""
    assert Units.attention(ARCHITECTURE, "kv_group") == Units(1, 2, 12)
    assert Units.attention(ARCHITECTURE, "query_head") == Units(2, 3, 4)
    assert Units.mlp(ARCHITECTURE) == Units(1, 10, 1)


def test_columns_go_rank_by_rank_over_the_sets() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    expected = [4, 5, 8, 9, 0, 1, 10, 11, 2, 3, 6, 7]
    assert Units(2, 3, 2).columns(order).tolist() == expected


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_columns_are_those_of_the_elastic_layer(unit: str) -> None:
    """The order of units and the order of heads describe the same rows."""
    heads = torch.tensor([[1.0, 5.0, 3.0], [9.0, 2.0, 4.0]])
    order = order_of(UnitScores(heads, torch.ones(10)), Recipe("wifv", "none", 0.1, unit).unit)
    units = Units.attention(ARCHITECTURE, unit)
    scores = heads if unit == "query_head" else heads.sum(1, keepdim=True).T
    columns = units.columns(scores.argsort(dim=1, descending=True))
    expected = order.heads if unit == "kv_group" else order.heads.T
    assert columns.tolist() == head_rows(expected, 4).tolist()


def test_mean_and_spread() -> None:
    units = Units(2, 2, 3)
    values = torch.arange(12.0)
    assert units.mean(values).tolist() == [[1.0, 4.0], [7.0, 10.0]]
    spread = units.spread(torch.tensor([[3.0, 6.0], [0.0, 9.0]]))
    assert spread.tolist() == [1.0] * 3 + [2.0] * 3 + [0.0] * 3 + [3.0] * 3
