"""Plans: the integers kept per layer, and the grid of allowed values (no torch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from pruning.architecture import Architecture

AttentionUnit = Literal["kv_group", "query_head"]


@dataclass(frozen=True)
class LayerPlan:
    """Units that remain in one layer."""

    kv_groups: int
    q_per_group: int
    mlp_channels: int


@dataclass(frozen=True)
class Plan:
    """Units that remain in every layer: hashable, the key of every cache."""

    layers: tuple[LayerPlan, ...]

    @cached_property
    def key(self) -> str:
        """A short stable name of the plan: equal plans have equal keys on every machine."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep the same, without which no stock architecture holds the model."""
        return len(set(self.layers)) == 1

    def to_json(self) -> list[list[int]]:
        """Return `[[kv_groups, q_per_group, mlp_channels], ...]`, one row a layer."""
        return [[x.kv_groups, x.q_per_group, x.mlp_channels] for x in self.layers]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: a row is not three whole numbers of at least 1.
        """
        for index, row in enumerate(rows):
            numbers = row if isinstance(row, (list, tuple)) else ()
            whole = all(isinstance(x, int) and not isinstance(x, bool) for x in numbers)
            if len(numbers) != 3 or not whole or min(numbers) < 1:
                raise ValueError(f"plan, layer {index}: got {row!r}, want three integers >= 1")
        return cls(tuple(LayerPlan(*row) for row in rows))

    @classmethod
    def dense(cls, architecture: Architecture) -> Plan:
        """Return the plan that keeps everything."""
        layer = LayerPlan(architecture.kv_heads, architecture.q_per_group, architecture.mlp)
        return cls((layer,) * architecture.layers)


@dataclass(frozen=True)
class Grid:
    """Allowed kept values of the two blocks, ascending; a level is an index into one of them.

    Attention counts KV groups (each with all its query heads) or, for `query_head`, the query
    heads that stay in every group. The last level of either block is the dense value.
    """

    unit: AttentionUnit
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    dense: LayerPlan

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        step: int,
        unit: AttentionUnit = "kv_group",
        prune_attention: bool = True,
    ) -> Grid:
        """Return the grid with MLP channels in multiples of `step`.

        Raises:
            ValueError: `step` is not between 1 and the MLP width.
        """
        if not 1 <= step <= architecture.mlp:
            raise ValueError(f"pruning.step: got {step}, allowed 1 to {architecture.mlp}")
        units = architecture.kv_heads if unit == "kv_group" else architecture.q_per_group
        attention = tuple(range(1, units + 1)) if prune_attention else (units,)
        mlp = (*range(step, architecture.mlp, step), architecture.mlp)
        dense = LayerPlan(architecture.kv_heads, architecture.q_per_group, architecture.mlp)
        return cls(unit, attention, mlp, dense)

    def keeping(self, attention: Sequence[int], mlp: Sequence[int]) -> Grid:
        """Return the grid with these levels alone, ascending and with the dense ones."""
        return replace(
            self,
            attention=tuple(self.attention[x] for x in attention),
            mlp=tuple(self.mlp[x] for x in mlp),
        )

    @property
    def mlp_step(self) -> int:
        """Channels of one MLP step: the smallest width, the mean where levels were left out."""
        steps = {upper - lower for lower, upper in pairwise((0, *self.mlp[:-1]))}
        return self.mlp[0] if len(steps) <= 1 else round(self.mlp[-1] / len(self.mlp))

    def layer(self, attention_level: int, mlp_level: int) -> LayerPlan:
        """Return the layer that keeps these two levels."""
        kept = self.attention[attention_level]
        if self.unit == "kv_group":
            return LayerPlan(kept, self.dense.q_per_group, self.mlp[mlp_level])
        return LayerPlan(self.dense.kv_groups, kept, self.mlp[mlp_level])

    def plan(self, levels: Sequence[tuple[int, int]]) -> Plan:
        """Return the plan with `(attention level, MLP level)` per layer."""
        return Plan(tuple(self.layer(a, m) for a, m in levels))

    def levels(self, plan: Plan) -> list[tuple[int, int]]:
        """Return `(attention level, MLP level)` per layer.

        Raises:
            ValueError: a kept value is not on this grid.
        """
        result = []
        for index, layer in enumerate(plan.layers):
            kept = layer.kv_groups if self.unit == "kv_group" else layer.q_per_group
            if kept not in self.attention or layer.mlp_channels not in self.mlp:
                raise ValueError(f"plan, layer {index}: {layer} is not on the grid")
            result.append((self.attention.index(kept), self.mlp.index(layer.mlp_channels)))
        return result
