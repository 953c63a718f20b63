"""Units: how the input channels of an output projection leave together.

Shapes: S sets, U units a set, C channels a unit; N = S * U * C input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.architecture import Architecture
from pruning.plan import AttentionUnit


@dataclass(frozen=True)
class Units:
    """Units of one output projection, channels of a unit and units of a set being neighbours.

    Every step of pruning takes one unit out of each set: one KV group of all (1, K, R * head_dim),
    one query head of every group (K, R, head_dim), or one MLP channel (1, F, 1).
    """

    sets: int
    per_set: int
    channels: int

    @classmethod
    def attention(cls, architecture: Architecture, unit: AttentionUnit) -> Units:
        """Return the units of the attention output projection."""
        groups, per_group = architecture.kv_heads, architecture.q_per_group
        if unit == "kv_group":
            return cls(1, groups, per_group * architecture.head_dim)
        return cls(groups, per_group, architecture.head_dim)

    @classmethod
    def mlp(cls, architecture: Architecture) -> Units:
        """Return the units of the MLP output projection: its channels."""
        return cls(1, architecture.mlp, 1)

    def mean(self, values_N: Tensor) -> Tensor:
        """Return the mean of each unit's channels (S, U)."""
        return values_N.view(self.sets, self.per_set, self.channels).mean(-1)

    def spread(self, values_SU: Tensor) -> Tensor:
        """Return one value a channel (N,): its unit's share of the unit's value."""
        shares = values_SU.unsqueeze(-1) / self.channels
        return shares.expand(self.sets, self.per_set, self.channels).flatten()

    def columns(self, order_SU: Tensor) -> Tensor:
        """Return channel indices (N,) such that every cut is a prefix.

        `order_SU` holds unit indices within each set, the first to stay first; rank by rank, one
        unit of every set follows the other.
        """
        first_set = torch.arange(self.sets, device=order_SU.device).unsqueeze(1) * self.per_set
        first = (first_set + order_SU).T.flatten().unsqueeze(1) * self.channels
        return (first + torch.arange(self.channels, device=order_SU.device)).flatten()
