"""Descent: plans a step away from the best one, downhill along its slopes.

The slopes of a plan say what every other level of every block would add to its fitness, to first
order (`pruning.slopes`). To second order a block that goes from one level to another adds what it
loses in between by itself, which the surrogate's curves tell: least squares leave errors at right
angles, so that losses of nested cuts add up. Both together are a model of fitness around that plan.
It has no products of blocks, and is damped for that: losses count up to four times on the way from
the best plan, as in the method of Levenberg and Marquardt (SIAM Journal 11, 1963, page 431). With a
price for every level of every block the best step is a knapsack. Models around earlier plans, which
lay near, are averaged in: one of few sequences tells more of the sequences than of the plan. Before
any score the curves are cut errors in a unit of their own, smaller than fitness where it was
measured: the first steps are longer than their damping says.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from agent.candidate import Candidate
from agent.knapsack import Losses, knapsack
from agent.ledger import SlopeLine
from agent.projection import Floats, Levels
from agent.questions import Slot
from agent.standing import ranked
from agent.state import SearchContext
from agent.surrogate import surrogate
from pruning.plan import Plan

Table = list[list[Floats]]  # `[layer][block][level]`

PRICE = 5
"""Plans scored in the time that the slopes of one take on the same sequences, rounded up."""

_MEMORY = 0.9  # weight of slopes beside those of a generation later
_DAMPING = (0.5, 4.0)  # least and largest
_KEPT = 3  # evaluations that slopes leave at least: they are for plans


def charge(context: SearchContext) -> Fraction:
    """Return the full evaluations that the slopes of a plan count as, 0 where none are measured."""
    used = context.settings.uses_slopes and context.slopes is not None
    return Fraction(PRICE * _count(context) * used, context.per_evaluation)


def measure(context: SearchContext, after: int) -> bool:
    """Add the slopes of the best plan to the ledger, as it stands after generation `after`.

    Return whether they were measured: not where they are on file, where fitness has no slopes, or
    where the plans that slopes are for could not be paid any more. Before the first generation
    `after` is -1.
    """
    price = charge(context)
    left = context.settings.evaluations - context.ledger.equivalents() - price
    on_file = any(x.generation == after for x in context.ledger.slopes())
    if not price or on_file or left < _KEPT:
        return False
    assert context.slopes is not None  # they have a price
    plan = context.grid.plan(_base(context, after + 1))
    table = context.slopes(plan, _sequences(context, after))
    rows = tuple((tuple(attention), tuple(mlp)) for attention, mlp in table)
    genotype = tuple((x.kv_groups, x.q_per_group, x.mlp_channels) for x in plan.layers)
    context.ledger.add_slopes(SlopeLine(after, genotype, price, rows))
    return True


def known(context: SearchContext, generation: int) -> list[SlopeLine]:
    """Return the slopes that were measured before a generation."""
    return [x for x in context.ledger.slopes() if x.generation < generation]


def footing(context: SearchContext, generation: int) -> list[Candidate]:
    """Return the candidate that a generation's steps are taken from, none before the first."""
    return ranked(context, 1, generation, complete=True)


def step(context: SearchContext, slot: Slot, rng: np.random.Generator) -> Levels | None:
    """Return a plan downhill of the best one, None where no slopes are known.

    How far it goes is drawn: the damping from its range, on a logarithmic scale.
    """
    lines = known(context, slot.generation)
    if not lines:
        return None
    least, largest = _DAMPING
    damping = least * (largest / least) ** rng.uniform()
    base = _base(context, slot.generation)
    curves = surrogate(context, slot.generation).table()
    models, losses = _models(context, lines, curves), _losses(curves, base)
    prices = [
        [model + (damping - 1) * loss for model, loss in zip(*pair, strict=True)]
        for pair in zip(models, losses, strict=True)
    ]
    return context.conform(knapsack(context.space, prices))


def _models(context: SearchContext, lines: Sequence[SlopeLine], curves: Losses) -> Table:
    """Return what every level is thought to add, the mean of what the lines say.

    Each line says so of its own plan, later ones weigh more.
    """
    newest = lines[-1].generation
    weights = np.array([_MEMORY ** (newest - x.generation) for x in lines])
    losses = [_losses(curves, context.grid.levels(Plan.from_json(x.genotype))) for x in lines]
    return [
        [
            np.average(
                [
                    np.array(x.table[i][b]) + loss[i][b]
                    for x, loss in zip(lines, losses, strict=True)
                ],
                axis=0,
                weights=weights,
            )
            for b in (0, 1)
        ]
        for i in range(len(curves))
    ]


def _losses(curves: Losses, plan: Levels) -> Table:
    """Return what going from the levels of a plan to others loses block by block, 0 for its own."""
    return [
        [np.abs(np.array(curve) - curve[level]) for curve, level in zip(row, levels, strict=True)]
        for row, levels in zip(curves, plan, strict=True)
    ]


def _base(context: SearchContext, generation: int) -> Levels:
    """Return the plan that steps are taken from; before any score one handed in, or the first."""
    found = [x.plan for x in footing(context, generation)] or context.starts
    return context.conform(context.grid.levels(found[0])) if found else context.first_plan


def _sequences(context: SearchContext, after: int) -> list[int]:
    """Return the sequences of these slopes: from the end on, where no plan is scored for long."""
    count, total = _count(context), len(context.sequences)
    places = range((after + 1) * count, (after + 2) * count)
    return [context.sequences[-1 - i % total] for i in places]


def _count(context: SearchContext) -> int:
    return min(context.settings.slopes, len(context.sequences))
