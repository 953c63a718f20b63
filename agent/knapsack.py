"""The plan of least summed loss within the budget: an exact dynamic programme.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter
11): every attention block and every MLP takes one level, costs and losses add up. Puzzle (arXiv
2411.19146) hands the same problem to a solver of integer programmes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent.projection import Floats, Levels, Space

Losses = Sequence[Sequence[Sequence[float] | Floats]]
Integers = NDArray[np.int64]

_BINS = 20_000  # capacities told apart where the costs have no unit that is coarse enough
_WORST = 1e6  # stands for a loss that is not finite


def knapsack(space: Space, losses: Losses) -> Levels:
    """Return the plan of least summed loss within the budget, MLP steps added until it is tight.

    `losses[layer][block][level]` is what keeping that level loses, block 0 attention and 1 MLP; a
    loss that is not finite counts as a large one. Levels stay within `space.bounds` until the
    last steps, which go where they lower the loss most for their cost. The plan is exact where
    all costs are multiples of a unit that goes into the budget at most `_BINS` times; otherwise
    costs are rounded up to bins, so that the plan stays within the budget and loses at most what
    a bin a block is worth.
    """
    blocks = [(layer, block) for layer in range(space.layers) for block in (0, 1)]
    spans = [range(space.bounds[b][0], space.bounds[b][1] + 1) for _, b in blocks]
    costs = [space.costs[b][i, s.start : s.stop] for (i, b), s in zip(blocks, spans, strict=True)]
    table = [
        finite(losses[i][b])[s.start : s.stop] for (i, b), s in zip(blocks, spans, strict=True)
    ]
    weights, capacity = _whole(costs, space.budget.limit)
    picks = _least(weights, table, capacity)
    levels = [spans[k].start + pick for k, pick in enumerate(picks)]
    return _filled(space, list(zip(levels[::2], levels[1::2], strict=True)), losses)


def _whole(costs: Sequence[Floats], limit: float) -> tuple[list[Integers], int]:
    """Return costs above the cheapest level as whole numbers, and how many of them fit.

    A cost that is no multiple of the unit is rounded up, what fits is rounded down.
    """
    extra = [x - x.min() for x in costs]
    room = max(0.0, limit - sum(float(x.min()) for x in costs))
    room = min(room, sum(float(x.max()) for x in extra))
    unit = _common(np.concatenate(extra))
    if unit is None or room / unit > _BINS:
        unit = max(room, 1.0) / _BINS
        return [np.ceil(x / unit).astype(np.int64) for x in extra], int(room / unit)
    return [np.rint(x / unit).astype(np.int64) for x in extra], int(room // unit)


def _common(costs: Floats) -> float | None:
    """Return the greatest common divisor of whole costs, None where one is not whole."""
    whole = np.rint(costs)
    if (whole != costs).any() or whole.max(initial=0.0) < 1:
        return None
    return float(math.gcd(*whole.astype(np.int64).tolist()))


def _least(weights: Sequence[Integers], losses: Sequence[Floats], capacity: int) -> list[int]:
    """Return an item of every group: least summed loss of all that weigh `capacity` at most.

    Every group has an item of weight 0. Of equal losses the first item of a group is taken.
    """
    least = np.zeros(capacity + 1)
    taken = []
    for group, values in zip(weights, losses, strict=True):
        best = np.full(capacity + 1, np.inf)
        picks = np.zeros(capacity + 1, dtype=np.int16)
        for item, (weight, loss) in enumerate(zip(group.tolist(), values.tolist(), strict=True)):
            if weight > capacity:
                continue
            found = least[: capacity + 1 - weight] + loss
            better = found < best[weight:]
            best[weight:][better] = found[better]
            picks[weight:][better] = item
        least = best
        taken.append(picks)
    chosen = []
    for group, picks in zip(reversed(weights), reversed(taken), strict=True):
        item = int(picks[capacity])
        capacity -= int(group[item])
        chosen.append(item)
    return chosen[::-1]


def _filled(space: Space, levels: Levels, losses: Losses) -> Levels:
    """Return `levels` with MLP steps added while any fits, allowed ones first."""
    cap = space.bounds[1][1]
    mlp = [finite(x[1]) for x in losses]

    def gain(layer: int, level: int) -> float:
        costs, loss = space.budget.mlp[layer], mlp[layer]
        saved = (loss[level] - loss[level + 1]) / (costs[level + 1] - costs[level])
        return -math.inf if level >= cap else float(saved)

    return space.grow(levels, gain)


def finite(losses: Sequence[float] | Floats) -> Floats:
    """Return losses that can be compared: what is not finite is a million, or 0 where gained."""
    values = np.asarray(losses, dtype=np.float64)
    return np.nan_to_num(values, nan=_WORST, posinf=_WORST, neginf=0.0)
