"""Allocations that need no search: one plan within the budget and tight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from agent.knapsack import finite
from agent.projection import Floats, Levels, Space

Sensitivity = Sequence[Sequence[Sequence[float]]]
UnitScores = Sequence[Sequence[Sequence[float]]]
_WORST = 1e30
_OWL_SPREAD = 0.08  # lambda of the paper


def uniform(space: Space) -> Levels:
    """Return one rate for all blocks, attention as near to it as its units allow."""
    return space.project(np.full((space.layers, 2), space.target))


def uniform_mlp(space: Space) -> Levels:
    """Return dense attention and one rate for all MLPs.

    Attention units go, from layer 0 on, only where the smallest allowed MLPs would not fit.
    """
    dense = len(space.grid.attention) - 1
    return space.hold([dense] * space.layers, np.full(space.layers, space.target))


def heuristic(space: Space, sensitivity: Sensitivity) -> Levels:
    """Return the plan of least summed cut error under the additive model, greedily.

    `sensitivity[layer][block][level]` is the error of keeping that level. The cuts of each block
    are taken along the lower convex hull of error over cost, cheapest error per cost first, so
    that a coarse attention unit competes with many MLP steps at once; this is the greedy solution
    of the multiple-choice knapsack (its linear relaxation up to one cut).
    """
    top = [bound[1] for bound in space.bounds]
    levels = [(top[0], top[1])] * space.layers
    for floors in ((space.bounds[0][0], space.bounds[1][0]), (0, 0)):
        for _, layer, block, level in _cuts(space, sensitivity, levels, floors):
            if space.budget.is_within(levels):
                break
            levels = _cut(space, levels, layer, block, level)
    errors = [[finite(sensitivity[i][1])] for i in range(space.layers)]

    def gain(layer: int, level: int) -> float:
        costs, error = space.budget.mlp[layer], errors[layer][0]
        value = (error[level] - error[level + 1]) / (costs[level + 1] - costs[level])
        return float(value) - _WORST * (level >= top[1])

    return space.grow(levels, gain)


def owl(space: Space, outliers: Sequence[float]) -> Levels:
    """Return one rate a layer, lower where more activations are outliers.

    OWL (Yin et al., arXiv 2310.05175, eq. 4): the shares D of outliers are scaled to a range of
    2 lambda, and a layer keeps its own minus their mean more than the target, so that removed
    shares lie within lambda of the asked one. `outliers[layer]` is D, lambda 0.08.
    """
    shares = np.asarray(outliers, dtype=np.float64)
    spread = np.ptp(shares)
    scaled = (shares - shares.min()) * (2 * _OWL_SPREAD / spread if spread > 0 else 0.0)
    kept = space.target + scaled - scaled.mean()
    return space.project(np.stack([kept, kept], axis=1))


def flap_global(space: Space, scores: UnitScores) -> Levels:
    """Return the plan that one threshold over all units of all layers leaves.

    FLAP's adaptive structure (An et al., arXiv 2312.11983, section 3.2, "AL-AM") with what units
    really cost, where the public code has the ratio of a LLaMA with as many KV heads as query
    heads built in. `scores[layer][block]` are standardised scores of the units in rank order,
    block 0 attention units and 1 MLP channels. The threshold is the lowest that the budget
    allows; blocks below it keep their least, and channels are rounded to steps.
    """
    pooled = np.unique(np.concatenate([np.ravel(x) for layer in scores for x in layer]))
    low, high = 0, len(pooled)
    while low < high:
        middle = (low + high) // 2
        if _kept_cost(space, scores, pooled[middle]) <= space.budget.limit:
            high = middle
        else:
            low = middle + 1
    counts = _kept_units(space, scores, pooled[min(low, len(pooled) - 1)])
    return space.hold(_attention_levels(space, counts), counts[:, 1] / space.grid.mlp[-1])


def _kept_units(space: Space, scores: UnitScores, threshold: float) -> Floats:
    """Return how many attention units and channels (layers, 2) score at least `threshold`."""
    counts = [[(np.asarray(x) >= threshold).sum() for x in layer] for layer in scores]
    kept: Floats = np.maximum(np.array(counts, dtype=np.float64), [1, space.grid.mlp[0]])
    return kept


def _attention_levels(space: Space, counts: Floats) -> list[int]:
    """Return the largest allowed levels of at most that many units; the least where none is."""
    levels = np.searchsorted(space.grid.attention, counts[:, 0], side="right") - 1
    return [int(x) for x in levels.clip(min=0)]


def _kept_cost(space: Space, scores: UnitScores, threshold: float) -> float:
    counts = _kept_units(space, scores, threshold)
    rows, levels = np.arange(space.layers), _attention_levels(space, counts)
    channels = counts[:, 1] / space.grid.mlp[-1]
    return float(space.costs[0][rows, levels].sum() + (space.costs[1][:, -1] * channels).sum())


def _cuts(
    space: Space, sensitivity: Sensitivity, levels: Levels, floors: tuple[int, int]
) -> list[tuple[float, int, int, int]]:
    """Return cuts `(error per cost, layer, block, level to go to)`, the cheapest first."""
    cuts = []
    for layer, pair in enumerate(levels):
        for block in (0, 1):
            costs = (space.budget.attention, space.budget.mlp)[block][layer]
            errors = finite(sensitivity[layer][block])
            hull = _lower_hull(costs, errors, floors[block], pair[block])
            for upper, lower in pairwise(hull):
                slope = (errors[lower] - errors[upper]) / (costs[upper] - costs[lower])
                cuts.append((float(slope), layer, block, lower))
    return sorted(cuts)


def _cut(space: Space, levels: Levels, layer: int, block: int, level: int) -> Levels:
    """Return `levels` cut to `level`; an MLP only as far as the budget asks."""
    result = list(levels)
    attention, mlp = result[layer]
    if block == 0:
        result[layer] = (min(attention, level), mlp)
        return result
    while mlp > level and not space.budget.is_within(result):
        mlp -= 1
        result[layer] = (attention, mlp)
    return result


def _lower_hull(costs: Sequence[float], errors: Floats, low: int, high: int) -> list[int]:
    """Return levels on the lower convex hull of error over cost, from `high` down to `low`."""
    hull: list[int] = []
    for level in range(high, low - 1, -1):
        while len(hull) > 1 and _is_above(costs, errors, hull[-2], hull[-1], level):
            hull.pop()
        hull.append(level)
    return hull


def _is_above(costs: Sequence[float], errors: Floats, left: int, middle: int, right: int) -> bool:
    """Return whether `middle` lies on or above the line from `left` to `right`."""
    whole = (errors[right] - errors[left]) * (costs[left] - costs[middle])
    part = (errors[middle] - errors[left]) * (costs[left] - costs[right])
    return bool(part >= whole)
