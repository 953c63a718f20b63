"""Ranking: the importance of units, and the order in which they will be given up.

Shapes: H query heads, K KV groups, R query heads a group, F MLP channels, O output channels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruning.architecture import Architecture
from pruning.metrics.registry import channel_scores
from pruning.output_projection import OutputProjection
from pruning.plan import AttentionUnit
from pruning.statistics import BlockStatistics


@dataclass(frozen=True)
class UnitScores:
    """Importance in float64, higher = keep: query heads (K, R) and MLP channels (F,).

    Values of a metric, or, for metrics that find an order of removal, its steps.
    """

    heads: Tensor
    mlp: Tensor

    @property
    def attention(self) -> Tensor:
        """Importance of each KV group (K,): the sum over its query heads."""
        return self.heads.sum(1)


@dataclass(frozen=True)
class Order:
    """Units from most to least important: KV groups (K,), query heads (K, R), channels (F,).

    `heads[g]` are the dense head indices of the g-th group in the new order. Only one of the two
    attention units is ranked; the other keeps its dense order.
    """

    groups: Tensor
    heads: Tensor
    channels: Tensor


def unit_scores(
    metrics: tuple[str, str],
    attention: OutputProjection,
    mlp: OutputProjection,
    architecture: Architecture,
    *,
    ridges: tuple[float, float],
    seed: int,
) -> UnitScores:
    """Return the importance of the units of one layer.

    A query head's score is the sum over its channels of the metric on the output projection
    (O, H * head_dim); heads of a group are neighbours (head h belongs to group h // R). `metrics`
    and `ridges`, those of the least-squares corrections, are of attention and of the MLP.
    """
    heads, channels = (
        channel_scores(metric, x.measured, x.statistics, x.units, ridge=ridge, seed=seed + block)
        for block, (metric, x, ridge) in enumerate(
            zip(metrics, (attention, mlp), ridges, strict=True)
        )
    )
    shape = (architecture.kv_heads, architecture.q_per_group, architecture.head_dim)
    return UnitScores(heads.view(shape).sum(-1), channels)


def order_of(scores: UnitScores, unit: AttentionUnit) -> Order:
    """Return units by falling importance; ties go by index."""
    num_groups, per_group = scores.heads.shape
    dense = torch.arange(num_groups * per_group, device=scores.heads.device)
    heads = dense.view(num_groups, per_group)
    groups = torch.arange(num_groups, device=heads.device)
    if unit == "kv_group":
        groups = scores.attention.argsort(descending=True, stable=True)
        heads = heads[groups]
    else:
        heads = heads.gather(1, scores.heads.argsort(dim=1, descending=True, stable=True))
    return Order(groups, heads, scores.mlp.argsort(descending=True, stable=True))


def order_hash(orders: list[Order]) -> str:
    """Return a short name of the ranking of a whole model: a plan means nothing without it."""
    digest = hashlib.sha256()
    for order in orders:
        for tensor in (order.groups, order.heads, order.channels):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def head_rows(heads: Tensor, head_dim: int) -> Tensor:
    """Return the row indices of whole heads, `head_dim` neighbours each, in the given order."""
    start = heads.flatten().unsqueeze(1) * head_dim
    return (start + torch.arange(head_dim, device=heads.device)).flatten()


def permuted(statistics: BlockStatistics, index: Tensor) -> BlockStatistics:
    """Return the statistics with their channels in the order `index` (N,)."""
    held_out = statistics.held_out
    return replace(
        statistics,
        mean=statistics.mean[index],
        square=statistics.square[index],
        gram=statistics.gram[index][:, index],
        held_out=None if held_out is None else permuted(held_out, index),
    )
