"""Probes: what cutting a single block costs, measured on the dense model before the search.

The replace-one-block score of Puzzle (arXiv 2411.19146, section 3), taken at one level a block:
the shape of the curve over levels comes from the closed-form cut errors, the probe gives its scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agent.ledger import Probe
from agent.projection import Space
from agent.scoring import values
from agent.state import SearchContext

Cut = tuple[int | None, int | None, int | None]

_DENSE: Cut = (None, None, None)
_FEW = 4  # attention levels that are all probed


def check(context: SearchContext) -> None:
    """Refuse probes that leave no evaluation.

    Raises:
        ValueError: one line.
    """
    plans, limit = len(cuts(context.space)), context.settings.evaluations
    seen, of = _sequences(context), context.per_evaluation
    if seen and plans * seen > (limit - 1) * of:
        raise ValueError(
            f"search.probes: {plans} plans on {seen} of {of} sequences come to "
            f"{plans * seen / of:.4g} evaluations, search.evaluations is {limit} and one must be "
            "left"
        )


def measured(context: SearchContext) -> Iterator[Probe]:
    """Yield each probe that is scored now and on file by then; what is on file is not repeated.

    The plans of a layer are scored together on the first sequences.
    """
    seen = _sequences(context)
    known = {x.cut for x in context.ledger.probes()}
    for layer in (None, *range(context.space.layers)) if seen else ():
        wanted = [x for x in cuts(context.space) if x[0] == layer and x not in known]
        plans = [context.grid.plan(levels(context.space, x)) for x in wanted]
        table = values(context, plans, context.window(0)[:seen]) if plans else np.empty((0, seen))
        for cut, row in zip(wanted, table.tolist(), strict=True):
            probe = Probe(*cut, of=context.per_evaluation, values=tuple(row))
            context.ledger.add_probe(probe)
            yield probe


def cuts(space: Space) -> list[Cut]:
    """Return which cuts are probed: none (the dense model), then layer by layer.

    Every MLP at the allowed level nearest to the budget's share; attention at every allowed level
    where there are few, else there as well.
    """
    found = [_DENSE]
    for layer in range(space.layers):
        for block in (0, 1):
            found += [(layer, block, level) for level in _levels(space, block)]
    return found


def levels(space: Space, cut: Cut) -> list[tuple[int, int]]:
    """Return the levels of the dense model with this cut."""
    layer, block, level = cut
    plan = [(len(space.kept[0]) - 1, len(space.kept[1]) - 1)] * space.layers
    if layer is not None and level is not None:
        attention, mlp = plan[layer]
        plan[layer] = (level, mlp) if block == 0 else (attention, level)
    return plan


def _levels(space: Space, block: int) -> list[int]:
    """Return the levels at which a block is probed."""
    low, top = space.bounds[block][0], len(space.kept[block]) - 1
    allowed = list(range(low, top))
    if block == 0 and len(allowed) <= _FEW:
        return allowed
    return sorted(allowed, key=lambda x: abs(space.kept[block][x] - space.target))[:1]


def _sequences(context: SearchContext) -> int:
    """Return on how many sequences a probe is scored."""
    return min(context.settings.probes, context.per_evaluation)
