"""Plans: the integers kept per layer, the grid of allowed values, and the budget (no torch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pruning.architecture import Architecture

AttentionUnit = Literal["kv_group", "query_head"]
BudgetKind = Literal["parameters", "macs", "bytes"]


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
        """Whether all layers keep the same, so that a stock architecture can hold the model."""
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
            whole = all(isinstance(x, int) and not isinstance(x, bool) for x in row)
            if len(row) != 3 or not whole or min(row) < 1:
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


@dataclass(frozen=True)
class Budget:
    """An additive cost table and a limit: `attention[layer][level] + mlp[layer][level]` summed.

    `target` is what was asked (a share of the blocks' cost up to 1, or a total parameter
    count), `limit` the same in the table's unit, `dense` the cost of keeping everything.
    """

    kind: BudgetKind
    target: float
    limit: float
    dense: float
    attention: tuple[tuple[float, ...], ...]
    mlp: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        grid: Grid,
        kind: BudgetKind,
        target: float,
        *,
        correction_biases: bool = False,
        tokens: int = 512,
        bytes_per_weight: int = 2,
    ) -> Budget:
        """Return the budget for `target` on `grid`.

        `tokens` is the sequence length at which MACs are counted; `correction_biases` says
        whether the pruned model carries them, which only matters for a total above 1.

        Raises:
            ValueError: the target is not positive, a total is asked of another kind than
                parameters, or even the smallest plan of the grid is over the limit.
        """
        if target <= 0:
            raise ValueError(f"budget.{kind}: got {target}, want a share (0, 1] or a total")
        if target > 1 and kind != "parameters":
            raise ValueError(f"budget.{kind}: got {target}, only shares up to 1 are allowed")
        attention_row, mlp_row = _cost_rows(architecture, grid, kind, tokens, bytes_per_weight)
        dense = architecture.layers * (attention_row[-1] + mlp_row[-1])
        if target > 1:
            limit = target - architecture.fixed_parameters(correction_biases)
        else:
            limit = target * dense
        smallest = architecture.layers * (attention_row[0] + mlp_row[0])
        if limit < smallest:
            raise ValueError(
                f"budget.{kind}: {target:g} cannot be met; the smallest plan of this grid "
                f"keeps {smallest / dense:.4f} of the blocks"
            )
        return cls(
            kind,
            target,
            limit,
            dense,
            (attention_row,) * architecture.layers,
            (mlp_row,) * architecture.layers,
        )

    def cost(self, levels: Sequence[tuple[int, int]]) -> float:
        """Return the cost of `(attention level, MLP level)` per layer."""
        return sum(self.attention[i][a] + self.mlp[i][m] for i, (a, m) in enumerate(levels))

    def is_within(self, levels: Sequence[tuple[int, int]]) -> bool:
        """Return whether the plan with these levels costs at most the limit."""
        return self.cost(levels) <= self.limit

    def is_tight(self, levels: Sequence[tuple[int, int]]) -> bool:
        """Return whether no further MLP step fits anywhere."""
        spare = self.limit - self.cost(levels)
        return all(
            m + 1 >= len(self.mlp[i]) or self.mlp[i][m + 1] - self.mlp[i][m] > spare
            for i, (_, m) in enumerate(levels)
        )

    def achieved(self, levels: Sequence[tuple[int, int]]) -> float:
        """Return the share of the blocks' dense cost that the plan keeps."""
        return self.cost(levels) / self.dense


def _cost_rows(
    architecture: Architecture, grid: Grid, kind: BudgetKind, tokens: int, bytes_per_weight: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the cost of each attention level and of each MLP level of one layer."""
    scale = bytes_per_weight if kind == "bytes" else 1
    attention, mlp = [], []
    for level in range(len(grid.attention)):
        layer = grid.layer(level, 0)
        if kind == "macs":
            cost = architecture.attention_macs(layer.kv_groups, layer.q_per_group, tokens)
        else:
            cost = architecture.attention_parameters(layer.kv_groups, layer.q_per_group)
        attention.append(float(cost * scale))
    for channels in grid.mlp:
        if kind == "macs":
            mlp.append(float(architecture.mlp_macs(channels, tokens)))
        else:
            mlp.append(float(architecture.mlp_parameters(channels) * scale))
    return tuple(attention), tuple(mlp)
