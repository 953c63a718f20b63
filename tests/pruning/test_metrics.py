"""Metrics against loops in plain Python, the fold into units, and the order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.architecture import Architecture
from pruning.elastic_layer import Recipe
from pruning.metrics.registry import CHANNEL_METRICS, NAMES, channel_scores
from pruning.output_projection import OutputProjection
from pruning.ranking import (
    Order,
    UnitScores,
    head_rows,
    order_hash,
    order_of,
    permuted,
    unit_scores,
)
from pruning.statistics import BlockStatistics
from pruning.units import Units

GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
INPUTS = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64) * torch.arange(1, 7) + 0.5


def _statistics(x: Tensor) -> BlockStatistics:
    return BlockStatistics(len(x), x.mean(0), x.square().mean(0), x.T @ x / len(x), 1.0)


def _scores(name: str, weight: Tensor, x: Tensor, seed: int = 0) -> Tensor:
    """The scores of single channels."""
    units = Units(1, x.shape[1], 1)
    return channel_scores(name, weight, _statistics(x), units, ridge=0.1, seed=seed)


def _unit_scores(
    metric: str | tuple[str, str],
    output: Tensor,
    attention: Tensor,
    architecture: Architecture,
    seed: int = 0,
) -> UnitScores:
    """The scores of a layer whose MLP is `WEIGHT` on `INPUTS`."""
    units = Units.attention(architecture, "kv_group")
    return unit_scores(
        (metric, metric) if isinstance(metric, str) else metric,
        OutputProjection(output, _statistics(attention), units),
        OutputProjection(WEIGHT, _statistics(INPUTS), Units.mlp(architecture)),
        architecture,
        ridges=(0.1, 0.1),
        seed=seed,
    )


def _column(j: int) -> list[float]:
    return WEIGHT[:, j].tolist()


def _magnitude(j: int) -> float:
    return math.sqrt(sum(w * w for w in _column(j)))


def _wanda_sp(j: int) -> float:
    x = INPUTS[:, j].tolist()
    norm = math.sqrt(sum(value * value for value in x) / len(x))
    return sum(abs(w) * norm for w in _column(j)) / 5


def _wifv(j: int) -> float:
    x = INPUTS[:, j].tolist()
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / (len(x) - 1)
    return variance * sum(w * w for w in _column(j))


@pytest.mark.parametrize(
    ("name", "oracle"), [("magnitude", _magnitude), ("wanda_sp", _wanda_sp), ("wifv", _wifv)]
)
def test_metric(name: str, oracle: Any) -> None:
    scores = _scores(name, WEIGHT, INPUTS)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([oracle(j) for j in range(6)], rel=1e-10)


def test_wifv_ignores_constant_channels() -> None:
    """Whatever its size: a bias replaces it without loss."""
    x = INPUTS.clone()
    x[:, 2] = 1000.0
    scores = _scores("wifv", WEIGHT, x)
    assert scores.argmin() == 2
    assert float(scores[2]) < 1e-6 * float(scores[0])
    assert _scores("wanda_sp", WEIGHT, x).argmax() == 2


@pytest.mark.parametrize("name", CHANNEL_METRICS)
def test_channels_without_a_column_score_nothing(name: str) -> None:
    weight = WEIGHT.clone()
    weight[:, 4] = 0
    assert float(_scores(name, weight, INPUTS)[4]) == 0


def test_random_is_a_function_of_the_seed() -> None:
    scores = [_scores("random", WEIGHT, INPUTS, seed) for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert torch.equal(scores[0], _scores("random", 9 * WEIGHT, INPUTS, 1))
    assert all(0 <= x < 1 for x in scores[0].tolist())


def test_unknown_metric_names_the_known() -> None:
    message = f"^pruning.metric: got 'wanda', allowed {', '.join(NAMES)}$"
    with pytest.raises(ValueError, match=message):
        _scores("wanda", WEIGHT, INPUTS)


def test_groups_are_neighbouring_heads() -> None:
    """Head j scores j + 1, 32 heads in 8 groups: 10, 26, ..., 122 (a strided fold: 52 to 80)."""
    architecture = Architecture("llama", 1, 64, 32, 8, 2, 6, 100, False)
    per_channel = torch.arange(1, 33, dtype=torch.float64).repeat_interleave(2) / 2
    scores = _unit_scores("magnitude", per_channel.unsqueeze(0), torch.ones(3, 64), architecture)
    assert scores.attention.tolist() == pytest.approx(list(range(10, 123, 16)))
    assert scores.heads.flatten().tolist() == pytest.approx(list(range(1, 33)))
    assert scores.mlp.tolist() == pytest.approx([_magnitude(j) for j in range(6)])


def test_heads_sum_their_channels() -> None:
    """Two groups of one head of three channels: the sum of the channels' scores."""
    architecture = Architecture("llama", 1, 5, 2, 2, 3, 6, 100, False)
    scores = _unit_scores("wifv", WEIGHT, INPUTS, architecture)
    expected = [sum(_wifv(j) for j in head) for head in ((0, 1, 2), (3, 4, 5))]
    assert scores.attention.tolist() == pytest.approx(expected)


def test_attention_may_have_a_metric_of_its_own() -> None:
    architecture = Architecture("llama", 1, 5, 2, 2, 3, 6, 100, False)
    alone = {x: _unit_scores(x, WEIGHT, INPUTS, architecture) for x in ("wifv", "obs")}
    mixed = _unit_scores(("obs", "wifv"), WEIGHT, INPUTS, architecture)
    assert torch.equal(mixed.heads, alone["obs"].heads)
    assert torch.equal(mixed.mlp, alone["wifv"].mlp)
    assert not torch.equal(mixed.heads, alone["wifv"].heads)
    recipe = Recipe("wifv", "bias", "auto", attention_metric="obs")
    assert recipe.metrics == ("obs", "wifv")
    assert recipe.holds_out
    assert not Recipe("wifv", "bias", "auto").holds_out


def test_random_blocks_are_independent() -> None:
    architecture = Architecture("llama", 1, 5, 6, 6, 1, 6, 100, False)
    scores = _unit_scores("random", WEIGHT, INPUTS, architecture, seed=4)
    assert scores.attention.tolist() != scores.mlp.tolist()


HEADS = torch.tensor([[1.0, 2.0, 3.0], [9.0, 0.0, 0.0], [4.0, 4.0, 4.0], [1.0, 5.0, 0.0]])
CHANNELS = torch.tensor([2.0, 7.0, 2.0, 7.0, 9.0])


def test_order_of_groups_falls_and_ties_go_by_index() -> None:
    """Group sums 6, 9, 12, 6: the first of the two sixes comes first."""
    order = order_of(UnitScores(HEADS, CHANNELS), "kv_group")
    assert order.groups.tolist() == [2, 1, 0, 3]
    assert order.heads.tolist() == [[6, 7, 8], [3, 4, 5], [0, 1, 2], [9, 10, 11]]
    assert order.channels.tolist() == [4, 1, 3, 0, 2]


def test_order_of_query_heads_falls_inside_each_group() -> None:
    order = order_of(UnitScores(HEADS, CHANNELS), "query_head")
    assert order.groups.tolist() == [0, 1, 2, 3]
    assert order.heads.tolist() == [[2, 1, 0], [3, 4, 5], [6, 7, 8], [10, 9, 11]]
    assert order.channels.tolist() == [4, 1, 3, 0, 2]


def test_many_ties_stay_in_place() -> None:
    """Long equal runs: an unstable sort would shuffle them."""
    order = order_of(UnitScores(torch.ones(64, 1), torch.ones(5000)), "kv_group")
    assert order.groups.tolist() == list(range(64))
    assert order.channels.tolist() == list(range(5000))


def test_order_hash_changes_with_every_part() -> None:
    base = order_of(UnitScores(HEADS, CHANNELS), "kv_group")
    again = order_of(UnitScores(HEADS.clone(), CHANNELS.clone()), "kv_group")
    swapped = CHANNELS[[1, 0, 2, 3, 4]]
    others = [
        order_of(UnitScores(HEADS, CHANNELS), "query_head"),
        order_of(UnitScores(HEADS.flip(0), CHANNELS), "kv_group"),
        order_of(UnitScores(HEADS, swapped), "kv_group"),
    ]
    hashes = {order_hash([base, x]) for x in others} | {order_hash([x, base]) for x in others}
    hashes |= {order_hash([base, base]), order_hash([base])}
    assert len(hashes) == 8
    assert order_hash([again, again]) == order_hash([base, base])


def test_head_rows() -> None:
    heads = torch.tensor([[2, 0], [3, 1]])
    assert head_rows(heads, 3).tolist() == [6, 7, 8, 0, 1, 2, 9, 10, 11, 3, 4, 5]
    assert head_rows(torch.tensor([1, 0]), 1).tolist() == [1, 0]


def test_permuted_statistics_are_those_of_permuted_inputs() -> None:
    index = torch.tensor([3, 1, 5, 0, 4, 2])
    found, expected = permuted(_statistics(INPUTS), index), _statistics(INPUTS[:, index])
    for name in ("mean", "square", "gram", "variance"):
        assert torch.allclose(getattr(found, name), getattr(expected, name))
    assert (found.count, found.residual_energy) == (40, 1.0)


def test_orders_hash_like_their_values() -> None:
    """The same integers in another layout: the same name."""
    base = order_of(UnitScores(HEADS, CHANNELS), "kv_group")
    strided = torch.stack([base.channels, base.channels], dim=1)[:, 0]
    copy = Order(base.groups, base.heads.T.contiguous().T, strided)
    assert order_hash([copy]) == order_hash([base])
