"""Descent: plans a step away from the best one, downhill along its slopes.

The slopes of a plan say what every other level of every block would add to its fitness, to first
order (`pruning.slopes`). How far that holds is what the surrogate's curves tell: what a block loses
between two levels is added as a penalty for going from one to the other, times a damping as that of
Levenberg and Marquardt (SIAM Journal 11, 1963, page 431). With a price for every level of every
block the best step is a knapsack; small dampings step far, large ones stay near. Slopes of earlier
plans, which lay near, are averaged in with less weight: those on few sequences tell more of the
sequences than of the plan.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from agent.knapsack import knapsack
from agent.ledger import SlopeLine
from agent.projection import Floats, Levels
from agent.questions import Slot
from agent.standing import ranked
from agent.state import SearchContext
from agent.surrogate import surrogate

PRICE = 4
"""Plans scored in the time that the slopes of one take on the same sequences."""

_MEMORY = 0.7  # weight of slopes beside those of a generation later
_DAMPING = (0.5, 8.0)  # least and largest
_GOLDEN = 0.618  # draws of a generation are spread over the range, whatever their number
_KEPT = 3  # evaluations that slopes leave at least: they are for plans


def measure(context: SearchContext, after: int) -> bool:
    """Add the slopes of the best plan to the ledger, as it stands after generation `after`.

    Return whether they were measured: not where they are on file, where fitness has no slopes, or
    where the plans that slopes are for could not be paid any more. Before the first generation
    `after` is -1.
    """
    count = min(context.settings.slopes, len(context.sequences))
    charge = Fraction(PRICE * count, context.per_evaluation)
    left = context.settings.evaluations - context.ledger.equivalents()
    known = any(x.generation == after for x in context.ledger.slopes())
    if context.slopes is None or known or left - charge < _KEPT:
        return False
    plan = context.grid.plan(_base(context, after + 1))
    table = context.slopes(plan, _sequences(context, after, count))
    rows = tuple((tuple(attention), tuple(mlp)) for attention, mlp in table)
    genotype = tuple((x.kv_groups, x.q_per_group, x.mlp_channels) for x in plan.layers)
    context.ledger.add_slopes(SlopeLine(after, genotype, charge, rows))
    return True


def step(context: SearchContext, slot: Slot, rng: np.random.Generator) -> Levels | None:
    """Return a plan downhill of the best one, None where no slopes are known.

    The first plan of a generation and its draws depend on the slot: dampings are spread out.
    """
    lines = [x for x in context.ledger.slopes() if x.generation < slot.generation]
    if not lines:
        return None
    least, largest = _DAMPING
    place = (slot.index * _GOLDEN + rng.uniform()) % 1
    damping = least * (largest / least) ** place
    base = _base(context, slot.generation)
    curves = surrogate(context, slot.generation).table()
    slopes = _mean(lines, base)
    prices = [
        [
            slope + damping * np.abs(np.array(curve) - curve[level])
            for slope, curve, level in zip(*row, strict=True)
        ]
        for row in zip(slopes, curves, base, strict=True)
    ]
    return context.conform(knapsack(context.space, prices))


def _base(context: SearchContext, generation: int) -> Levels:
    """Return the best plan before a generation, the first one of all before any."""
    best = ranked(context, 1, generation, complete=True)
    return context.grid.levels(best[0].plan) if best else context.first_plan


def _mean(lines: list[SlopeLine], base: Levels) -> list[list[Floats]]:
    """Return `[layer][block]` slopes by level, 0 at those of `base`, later lines weighing more."""
    newest = lines[-1].generation
    weights = np.array([_MEMORY ** (newest - x.generation) for x in lines])
    weights /= weights.sum()
    found = []
    for layer, levels in enumerate(base):
        row = []
        for block, level in enumerate(levels):
            curves = np.array([x.table[layer][block] for x in lines])
            mean = weights @ curves
            row.append(mean - mean[level])
        found.append(row)
    return found


def _sequences(context: SearchContext, after: int, count: int) -> list[int]:
    """Return the sequences of these slopes: from the end on, where no plan is scored for long."""
    start = (after + 1) * count
    total = len(context.sequences)
    return [context.sequences[-1 - (start + i) % total] for i in range(count)]
