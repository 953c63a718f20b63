"""What the next unit of a block is worth in a plan, and the layers in summary.

The error of a block at a level comes from the table of cut errors; the margin of a step is the
difference between two neighbouring levels. Levels come in the order in which layers are told.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent import briefing
from agent.projection import Levels
from agent.state import SearchContext

Floats = NDArray[np.float64]

_LARGEST = 99
_NAMED = 4
_GROUPS = ("early", "middle", "late")


def margins(context: SearchContext, levels: Levels) -> str:
    """Return one row a layer: units kept, error that taking one adds and that giving one saves.

    Errors run from 0 to 99, each kind of block on a scale of its own; a dash where the block has
    no such step.
    """
    blocks = _blocks(context)
    columns = [name for name, _ in blocks]
    columns += [f"{name} {way}" for name, _ in blocks for way in ("take", "give")]
    take, give = steps(context, levels)
    rows = [["layer", *columns]]
    for i, pair in enumerate(levels):
        kept = [str(_units(context, block)[pair[block]]) for _, block in blocks]
        rows.append([str(i), *kept, *(_cell(x[i, b]) for _, b in blocks for x in (take, give))])
    return "\n".join(",".join(row) for row in rows)


def statistics(context: SearchContext, levels: Levels) -> str:
    """Return mean and spread of units and errors in early, middle and late layers, and extremes."""
    blocks = _blocks(context)
    lines = []
    thirds = np.array_split(np.arange(context.space.layers), len(_GROUPS))
    for name, part in zip(_GROUPS, thirds, strict=True):
        if part.size:
            facts = [_group(context, levels, part, block) for block in blocks]
            lines.append(f"{name} layers {part[0]} to {part[-1]}: {'; '.join(facts)}")
    take, give = steps(context, levels)
    for name, block in blocks:
        lines.append(f"cheapest {name} to take: layers {_first(take[:, block])}")
        lines.append(f"{name} worth most when given: layers {_first(-give[:, block])}")
    return "\n".join(lines)


def steps(context: SearchContext, levels: Levels) -> tuple[Floats, Floats]:
    """Return the error that taking a unit adds and that giving one saves, each (layers, 2).

    Scaled to 0..99 per kind of block; NaN where the block may not go a level down or up.
    """
    take, give = np.full((2, len(levels), 2), np.nan)
    rows = context.disguise.rows(context.sensitivity)
    for block, (low, high) in enumerate(context.space.bounds):
        for i, pair in enumerate(levels):
            errors = np.nan_to_num(rows[i][block], posinf=0.0, neginf=0.0)
            level = pair[block]
            if level > low:
                take[i, block] = max(0.0, errors[level - 1] - errors[level])
            if level < high:
                give[i, block] = max(0.0, errors[level] - errors[level + 1])
    largest = np.nan_to_num(np.stack([take, give])).max(axis=(0, 1)).clip(1e-300)
    return take * (_LARGEST / largest), give * (_LARGEST / largest)


def _blocks(context: SearchContext) -> list[tuple[str, int]]:
    """Return the kinds of blocks that moves may name."""
    attention = [("attention", 0)] if "attention" in context.reply_bounds.units else []
    return [*attention, ("mlp", 1)]


def _units(context: SearchContext, block: int) -> Sequence[int]:
    """Return the units that each level keeps."""
    return context.grid.attention if block == 0 else range(1, len(context.grid.mlp) + 1)


def _group(
    context: SearchContext, levels: Levels, part: NDArray[np.int64], block: tuple[str, int]
) -> str:
    name, column = block
    units = np.array([_units(context, column)[x[column]] for x in levels])[part]
    errors = briefing.errors(context)[part, column]
    return f"{name} keeps {_mean(units)}, error {_mean(errors)}"


def _mean(values: NDArray[np.int64]) -> str:
    return f"{values.mean():.0f}+-{values.std():.0f}"


def _first(values: Floats) -> str:
    """Return the layers of the few smallest values, ties by index; NaN is none."""
    known = [i for i in np.argsort(values, kind="stable").tolist() if not np.isnan(values[i])]
    return " ".join(map(str, known[:_NAMED])) or "none"


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0f}"
