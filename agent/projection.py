"""The plans a search may visit, and the nearest of them to any wish.

A wish is an array of kept shares (layers, 2): column 0 attention, column 1 MLP, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruning.budget import Budget
from pruning.plan import Grid

Levels = list[tuple[int, int]]
Floats = NDArray[np.float64]

_EXACT = 1e-9
_HALVINGS = 50
_BEYOND_CAP = 10.0


@dataclass(frozen=True)
class Space:
    """A grid, a budget and the allowed removed share of every block.

    Every plan that leaves this class is within the budget and tight. Where the rates and the
    budget cannot both be had, the budget wins: shares below `1 - max_rate` when the limit is
    tighter than that, MLP shares above `1 - min_rate` when it is looser.
    """

    grid: Grid
    budget: Budget
    min_rate: float = 0.0
    max_rate: float = 0.9

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.budget.mlp)

    @cached_property
    def kept(self) -> tuple[Floats, Floats]:
        """Kept share of every attention level and of every MLP level."""
        attention, mlp = self.grid.attention, self.grid.mlp
        return np.array(attention) / attention[-1], np.array(mlp) / mlp[-1]

    @cached_property
    def costs(self) -> tuple[Floats, Floats]:
        """Cost of every level, per block kind an array (layers, levels)."""
        return np.array(self.budget.attention), np.array(self.budget.mlp)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Lowest and highest allowed level of attention and of MLP, inclusive."""
        attention, mlp = (_allowed(kept, self.min_rate, self.max_rate) for kept in self.kept)
        low = [(attention[0], mlp[0])] * self.layers
        high = [(attention[1], mlp[1])] * self.layers
        if not self.budget.is_within(low):
            return (0, attention[1]), (0, mlp[1])
        if self.budget.cost(high) < self.budget.limit:
            mlp = (mlp[0], len(self.kept[1]) - 1)
        return attention, mlp

    @property
    def target(self) -> float:
        """Share of the blocks' dense cost that may stay, at most 1."""
        return min(1.0, self.budget.limit / self.budget.dense)

    @property
    def one_share(self) -> float:
        """Share of every block that stays where all keep the same and cost the limit, 0 to 1."""

        def cost(share: float) -> float:
            return self._relaxed_cost(np.full((self.layers, 2), max(share, 0.0)))

        return max(0.0, _largest_shift(cost, self.budget.limit))

    def shares(self, levels: Sequence[tuple[int, int]]) -> Floats:
        """Return the kept shares (layers, 2) of a plan."""
        attention, mlp = self.kept
        return np.array([[attention[a], mlp[m]] for a, m in levels])

    def project(self, desired: ArrayLike) -> Levels:
        """Return the levels nearest to the kept shares `desired` (layers, 2).

        Least squares weighted by the cost of the blocks, so the relaxed optimum is one common
        shift of all shares, clipped to what is allowed: found by bisection. Attention is then
        rounded to levels and MLP fitted into what is left. A plan that already is within, tight
        and allowed comes back unchanged. NaN counts as the target share; values are clipped to
        0..1.

        Raises:
            ValueError: `desired` has another shape.
        """
        wish = self._clean(desired)
        exact = self._on_grid(wish)
        if exact is not None and self._is_settled(exact):
            return exact
        low, high = self._limits(attention=True)
        shift = _largest_shift(
            lambda s: self._relaxed_cost(np.clip(wish + s, low, high)), self.budget.limit
        )
        ideal = np.clip(wish + shift, low, high)
        return self.hold(_nearest(self.kept[0], ideal[:, 0]), wish[:, 1], ideal[:, 0])

    def settle(self, levels: Sequence[tuple[int, int]]) -> Levels:
        """Return `levels` made within and tight; attention changes only if it must."""
        if self._is_settled(levels):
            return list(levels)
        return self.hold([a for a, _ in levels], self.shares(levels)[:, 1])

    def hold(
        self, attention: Sequence[int], mlp_wish: Floats, attention_wish: Floats | None = None
    ) -> Levels:
        """Return a plan with these attention levels and MLP shares shifted to fit.

        Attention units are taken away, largest surplus over `attention_wish` first, only where
        even the smallest allowed MLPs would not fit.
        """
        attention = self._affordable(attention, attention_wish)
        spent = sum(self.budget.attention[i][a] for i, a in enumerate(attention))
        low, high = (bound[:, 1] for bound in self._limits(attention=False, spent=spent))
        room = self.budget.limit - spent
        shift = _largest_shift(
            lambda s: _interpolate(np.clip(mlp_wish + s, low, high), self.kept[1], self.costs[1]),
            room,
        )
        ideal = np.clip(mlp_wish + shift, low, high)
        mlp = np.maximum(np.searchsorted(self.kept[1], ideal, side="right") - 1, 0)
        levels = [(int(a), int(m)) for a, m in zip(attention, mlp, strict=True)]
        levels = self._shrink(levels, ideal)
        cap = self.bounds[1][1]

        def deficit(layer: int, level: int) -> float:
            return float(ideal[layer] - self.kept[1][level]) - _BEYOND_CAP * (level >= cap)

        return self._grow_attention(self.grow(levels, deficit), attention_wish)

    def grow(self, levels: Levels, priority: Callable[[int, int], float]) -> Levels:
        """Return `levels` with MLP steps added while any fits.

        `priority(layer, level)`: the step up from `level` with the largest value is taken
        first, ties by layer index.
        """
        levels, table = list(levels), self.budget.mlp
        while True:
            spare = self.budget.limit - self.budget.cost(levels)
            fitting = [
                i
                for i, (_, m) in enumerate(levels)
                if m + 1 < len(table[i]) and table[i][m + 1] - table[i][m] <= spare
            ]
            if not fitting:
                return levels
            best = max(fitting, key=lambda i: (priority(i, levels[i][1]), -i))
            levels[best] = (levels[best][0], levels[best][1] + 1)

    def _shrink(self, levels: Levels, ideal: Floats) -> Levels:
        """Return `levels` without the MLP steps that rounding of the bisection left over."""
        levels = list(levels)
        while not self.budget.is_within(levels) and any(m > 0 for _, m in levels):
            above = [i for i, (_, m) in enumerate(levels) if m > 0]
            worst = max(above, key=lambda i: (self.kept[1][levels[i][1]] - ideal[i], -i))
            levels[worst] = (levels[worst][0], levels[worst][1] - 1)
        return levels

    def one_rate(self, levels: Sequence[tuple[int, int]]) -> Levels:
        """Return the plan with one rate a layer for both blocks: the MLP's."""
        mlp = self.shares(levels)[:, 1]
        return self.project(np.stack([mlp, mlp], axis=1))

    def is_allowed(self, levels: Sequence[tuple[int, int]]) -> bool:
        """Return whether every level lies in `bounds`."""
        (a_low, a_high), (m_low, m_high) = self.bounds
        return all(a_low <= a <= a_high and m_low <= m <= m_high for a, m in levels)

    def _is_settled(self, levels: Sequence[tuple[int, int]]) -> bool:
        within, tight = self.budget.is_within(levels), self.budget.is_tight(levels)
        return within and tight and self.is_allowed(levels)

    def _clean(self, desired: ArrayLike) -> Floats:
        wish = np.asarray(desired, dtype=np.float64)
        if wish.shape != (self.layers, 2):
            raise ValueError(f"kept shares: got shape {wish.shape}, want ({self.layers}, 2)")
        return np.clip(np.where(np.isnan(wish), self.target, wish), 0.0, 1.0)

    def _on_grid(self, wish: Floats) -> Levels | None:
        levels = list(
            zip(_nearest(self.kept[0], wish[:, 0]), _nearest(self.kept[1], wish[:, 1]), strict=True)
        )
        return levels if np.abs(self.shares(levels) - wish).max() < _EXACT else None

    def _limits(self, *, attention: bool, spent: float = 0.0) -> tuple[Floats, Floats]:
        """Return lower and upper shares (layers, 2); MLP opens up where its cap leaves room."""
        (a_low, a_high), (m_low, m_high) = self.bounds
        capped = float(self.costs[1][:, m_high].sum())
        if not attention and spent + capped < self.budget.limit:
            m_high = len(self.kept[1]) - 1
        low = np.array([[self.kept[0][a_low], self.kept[1][m_low]]] * self.layers)
        high = np.array([[self.kept[0][a_high], self.kept[1][m_high]]] * self.layers)
        return low, high

    def _relaxed_cost(self, shares: Floats) -> float:
        return _interpolate(shares[:, 0], self.kept[0], self.costs[0]) + _interpolate(
            shares[:, 1], self.kept[1], self.costs[1]
        )

    def _affordable(self, attention: Sequence[int], wish: Floats | None) -> list[int]:
        """Return attention levels that leave room for the smallest allowed MLPs, if any do."""
        attention = list(attention)
        ideal = self.kept[0][attention] if wish is None else wish
        for floor, mlp_floor in ((self.bounds[0][0], self.bounds[1][0]), (0, 0)):
            while not self.budget.is_within([(a, mlp_floor) for a in attention]):
                over = [i for i, a in enumerate(attention) if a > floor]
                if not over:
                    break
                surplus = {i: self.kept[0][attention[i]] - ideal[i] for i in over}
                attention[max(over, key=lambda i: (surplus[i], -i))] -= 1
            else:
                break
        return attention

    def _grow_attention(self, levels: Levels, wish: Floats | None) -> Levels:
        """Return `levels` with attention units added while MLPs are full and a unit fits."""
        if wish is None or any(m + 1 < len(self.kept[1]) for _, m in levels):
            return levels
        levels, table = list(levels), self.budget.attention
        while True:
            spare = self.budget.limit - self.budget.cost(levels)
            fitting = [
                i
                for i, (a, _) in enumerate(levels)
                if a < self.bounds[0][1] and table[i][a + 1] - table[i][a] <= spare
            ]
            if not fitting:
                return levels
            deficit = {i: wish[i] - self.kept[0][levels[i][0]] for i in fitting}
            best = max(fitting, key=lambda i: (deficit[i], -i))
            levels[best] = (levels[best][0] + 1, levels[best][1])


def _allowed(kept: Floats, min_rate: float, max_rate: float) -> tuple[int, int]:
    """Return the lowest and highest level within the rates, or twice the level nearest to them."""
    low, high = 1 - max_rate, 1 - min_rate
    inside = np.flatnonzero((kept >= low - _EXACT) & (kept <= high + _EXACT))
    if inside.size:
        return int(inside[0]), int(inside[-1])
    nearest = int(np.argmin(np.maximum(low - kept, kept - high)))
    return nearest, nearest


def _nearest(kept: Floats, shares: Floats) -> list[int]:
    """Return the level nearest to each share; the lower one of two."""
    upper = np.clip(np.searchsorted(kept, shares), 1, max(len(kept) - 1, 1))
    upper = np.minimum(upper, len(kept) - 1)
    lower = np.maximum(upper - 1, 0)
    closer = kept[upper] - shares < shares - kept[lower]
    return [int(x) for x in np.where(closer, upper, lower)]


def _interpolate(shares: Floats, kept: Floats, costs: Floats) -> float:
    """Return the total cost at `shares` (layers,), linear between levels."""
    position = np.interp(shares, kept, np.arange(len(kept)))
    lower = np.minimum(position.astype(int), len(kept) - 1)
    upper = np.minimum(lower + 1, len(kept) - 1)
    rows = np.arange(len(shares))
    below, above = costs[rows, lower], costs[rows, upper]
    return float((below + (position - lower) * (above - below)).sum())


def _largest_shift(cost: Callable[[float], float], limit: float) -> float:
    """Return the largest shift in [-1, 1] whose cost (ascending) is at most `limit`, or -1."""
    low, high = -1.0, 1.0
    if cost(high) <= limit:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if cost(middle) <= limit:
            low = middle
        else:
            high = middle
    return low
