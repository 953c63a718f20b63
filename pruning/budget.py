"""Budgets: what a plan may cost, as an additive table over a grid and a limit (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pruning.architecture import Architecture
from pruning.plan import Grid, LayerPlan

BudgetKind = Literal["parameters", "macs", "bytes", "memory", "speedup"]
Row = tuple[float, ...]


@dataclass(frozen=True)
class Times:
    """Predicted nanoseconds: `base` of the whole model, and of every level of one layer's blocks.

    Whole numbers, so that sums are exact.
    """

    base: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """An additive cost table and a limit: `attention[layer][level] + mlp[layer][level]` summed.

    What was asked, `target`, is a share of the blocks' dense cost (`parameters`, `macs` and `bytes`
    up to 1), total parameters (above 1), bytes of the whole model (`memory`), or how many times as
    fast as the dense model a plan is predicted to be (`speedup`). `limit` is the same as a cost of
    the blocks in the table's unit, `dense` what keeping everything costs there, and `fixed` what
    the model costs beside its blocks, 0 where the target is a share.

    Costs rise from level to level.
    """

    kind: BudgetKind
    target: float
    limit: float
    dense: float
    attention: tuple[Row, ...]
    mlp: tuple[Row, ...]
    fixed: float = 0.0

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
        cached_tokens: int = 0,
        bytes_per_weight: int = 2,
    ) -> Budget:
        """Return the budget for `target` on `grid`, for every kind but `speedup`.

        Args:
            architecture: the dense model.
            grid: the allowed plans.
            kind: what is limited.
            target: how far, as in the class.
            correction_biases: whether the pruned model carries them; they count in totals.
            tokens: length of the sequence whose MACs are counted.
            cached_tokens: of all sequences, whose KV cache counts as `memory`.
            bytes_per_weight: of a weight and of a number in the KV cache.

        Raises:
            ValueError: the target is not positive, a total is asked of `macs` or `bytes`, or even
                the smallest plan of the grid is over the limit.
        """
        if kind == "speedup":
            raise ValueError("budget.speedup: needs predicted times; use Budget.timed")
        if target <= 0:
            raise ValueError(f"budget.{kind}: got {target}, want a share (0, 1] or a total")
        if target > 1 and kind in ("macs", "bytes"):
            raise ValueError(f"budget.{kind}: got {target}, only shares up to 1 are allowed")
        cache = cached_tokens if kind == "memory" else 0
        width = bytes_per_weight if kind in ("bytes", "memory") else 1
        attention, mlp = (
            _macs(architecture, grid, tokens)
            if kind == "macs"
            else (_weights(architecture, grid, width, cache))
        )
        is_total = kind == "memory" or target > 1
        fixed = width * architecture.fixed_parameters(correction_biases) if is_total else 0
        dense = architecture.layers * (attention[-1] + mlp[-1])
        limit = target - fixed if is_total else target * dense
        found = cls(
            kind,
            target,
            limit,
            dense,
            (attention,) * architecture.layers,
            (mlp,) * architecture.layers,
            fixed,
        )
        found._check()
        return found

    @classmethod
    def timed(cls, times: Times, layers: int, target: float) -> Budget:
        """Return the budget of plans predicted to be `target` times as fast as the dense one.

        `times` rise from level to level; the last one of each block is dense.

        Raises:
            ValueError: the target is below 1, times do not rise, or even the smallest plan of the
                grid is predicted to be slower.
        """
        if target < 1:
            raise ValueError(f"budget.speedup: got {target}, want at least 1")
        for name, row in (("attention", times.attention), ("mlp", times.mlp)):
            if any(lower >= upper for lower, upper in pairwise(row)):
                raise ValueError(f"budget.speedup: the times of {name} levels do not rise: {row}")
        attention = tuple(map(float, times.attention))
        mlp = tuple(map(float, times.mlp))
        dense = layers * (attention[-1] + mlp[-1])
        if dense <= 0:
            raise ValueError("budget.speedup: the blocks are predicted to take no time at all")
        limit = (dense + times.base) / target - times.base
        rows = (attention,) * layers, (mlp,) * layers
        found = cls("speedup", target, limit, dense, *rows, float(times.base))
        found._check()
        return found

    def at(self, target: float) -> Budget:
        """Return the same budget with another target, a share or a speedup.

        Raises:
            ValueError: this one is of another kind of target, or no plan is within the new one.
        """
        if self.kind == "speedup":
            limit = (self.dense + self.fixed) / target - self.fixed
        elif self.fixed:
            raise ValueError(f"budget.{self.kind}: {self.target:g} is no share of the blocks")
        else:
            limit = target * self.dense
        rows = self.attention, self.mlp
        found = Budget(self.kind, target, limit, self.dense, *rows, self.fixed)
        found._check()
        return found

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
        """Return what the plan comes to in the unit of `target`."""
        return self._reached(self.cost(levels))

    def _reached(self, cost: float) -> float:
        if self.kind == "speedup":
            return (self.dense + self.fixed) / (cost + self.fixed)
        return cost + self.fixed if self.fixed else cost / self.dense

    def _check(self) -> None:
        """Refuse a limit that no plan of the grid meets.

        Raises:
            ValueError: the smallest plan costs more.
        """
        smallest = self.cost([(0, 0)] * len(self.mlp))
        if smallest <= self.limit:
            return
        reached = self._reached(smallest)
        if self.kind == "speedup":
            best = f"is predicted to be {reached:.4f} times as fast"
        elif self.fixed:
            best = f"has {reached:.0f} {'bytes' if self.kind == 'memory' else 'parameters'}"
        else:
            best = f"keeps {reached:.4f} of the blocks"
        target = f"{self.target:.0f}" if self.target > 1 and self.fixed else f"{self.target:g}"
        raise ValueError(
            f"budget.{self.kind}: {target} cannot be met; the smallest plan of this grid {best}"
        )


def _weights(architecture: Architecture, grid: Grid, width: int, cache: int) -> tuple[Row, Row]:
    """Return parameters times `width`, and with attention the KV cache of `cache` tokens."""
    attention = [
        architecture.attention_parameters(layer.kv_groups, layer.q_per_group)
        + cache * architecture.kv_numbers(layer.kv_groups)
        for layer in _attention_layers(grid)
    ]
    mlp = [architecture.mlp_parameters(channels) for channels in grid.mlp]
    return tuple(float(width * x) for x in attention), tuple(float(width * x) for x in mlp)


def _macs(architecture: Architecture, grid: Grid, tokens: int) -> tuple[Row, Row]:
    """Return the multiply-accumulates of each level for one sequence of `tokens`."""
    attention = (
        float(architecture.attention_macs(layer.kv_groups, layer.q_per_group, tokens))
        for layer in _attention_layers(grid)
    )
    mlp = (float(architecture.mlp_macs(channels, tokens)) for channels in grid.mlp)
    return tuple(attention), tuple(mlp)


def _attention_layers(grid: Grid) -> list[LayerPlan]:
    return [grid.layer(level, 0) for level in range(len(grid.attention))]
