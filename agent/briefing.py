"""What prompts tell about plans, candidates and layers, as short text.

Levels are told in the order in which they come: `View.levels` puts them in the told order.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from agent.candidate import Candidate
from agent.projection import Levels, Space
from agent.state import SearchContext

_LARGEST = 99
_CHANGES = 6


def common(context: SearchContext) -> dict[str, str]:
    """Return the facts every prompt may name."""
    space = context.space
    return {
        "layers": str(space.layers),
        "last_layer": str(space.layers - 1),
        "target": f"{100 * (1 - _kept(space)):.0f}",
        "units": _units(context),
    }


def _kept(space: Space) -> float:
    """Return the share of the blocks' weights that stays where all are cut at one rate.

    Where time or memory is limited it is not the share of the budget.
    """
    return space.one_share if space.budget.kind in ("speedup", "memory") else space.target


def errors(context: SearchContext) -> NDArray[np.int64]:
    """Return the cut errors near the target share, scaled to 0..99, (layers, 2), as told."""
    space, rows = context.space, context.disguise.rows(context.sensitivity)
    columns = []
    for block, kept in enumerate(space.kept):
        level = int(np.argmin(np.abs(kept - space.target)))
        level = min(level, max(len(kept) - 2, 0))
        columns.append([row[block][level] for row in rows])
    table = np.nan_to_num(np.array(columns).T, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    scaled: NDArray[np.int64] = np.rint(table * (_LARGEST / max(table.max(), 1e-300))).astype(int)
    return scaled


def sensitivity(context: SearchContext) -> str:
    """Return one row of errors a layer."""
    rows = errors(context)
    if context.settings.granularity == "layer":
        return "\n".join(["layer,error", *(f"{i},{max(a, m)}" for i, (a, m) in enumerate(rows))])
    if len(context.grid.attention) == 1:
        return "\n".join(["layer,mlp", *(f"{i},{m}" for i, (_, m) in enumerate(rows))])
    return "\n".join(["layer,attention,mlp", *(f"{i},{a},{m}" for i, (a, m) in enumerate(rows))])


def table(context: SearchContext, levels: Levels) -> str:
    """Return one row a layer: units kept and errors, blocks that moves may name only."""
    attention = "attention" in context.reply_bounds.units
    columns = ["layer"] + (["attention"] if attention else []) + ["mlp"]
    values = [
        [i] + ([_units_kept(context, a)] if attention else []) + [m + 1]
        for i, (a, m) in enumerate(levels)
    ]
    if _shows(context, "sensitivity"):
        columns += (["attention error"] if attention else []) + ["mlp error"]
        for i, (a, m) in enumerate(errors(context)):
            values[i] += ([int(a)] if attention else []) + [int(m)]
    return "\n".join([",".join(columns), *(",".join(map(str, row)) for row in values)])


def vectors(context: SearchContext, levels: Levels) -> str:
    """Return the removed per cent per layer as the JSON that a reply of vectors has."""
    removed = np.rint(100 * (1 - context.space.shares(levels))).astype(int).tolist()
    if context.settings.granularity == "layer":
        data = {"rates": [m for _, m in removed]}
    else:
        data = {"attention": [a for a, _ in removed], "mlp": [m for _, m in removed]}
    return json.dumps(data, separators=(",", ":"))


def header(context: SearchContext, candidate: Candidate) -> str:
    """Return `plan 3: fitness 0.512, accuracy 41 %, speedup 1.20`."""
    parts = [f"fitness {candidate.fitness:.4g}"]
    if candidate.accuracy is not None and _shows(context, "accuracy"):
        parts.append(f"accuracy {100 * candidate.accuracy:.0f} %")
    if candidate.speedup is not None and _shows(context, "speedup"):
        parts.append(f"speedup {candidate.speedup:.2f}")
    return f"plan {candidate.id}: {', '.join(parts)}"


def rows_that_differ(context: SearchContext, first: Levels, second: Levels) -> str:
    """Return the units kept in both plans for every layer where they differ."""
    head = "layer,attention in first,mlp in first,attention in second,mlp in second"
    rows = [
        f"{i},{_units_kept(context, x[0])},{x[1] + 1},{_units_kept(context, y[0])},{y[1] + 1}"
        for i, (x, y) in enumerate(zip(first, second, strict=True))
        if x != y
    ]
    return "\n".join([head, *rows])


def levels(context: SearchContext, candidate: Candidate) -> Levels:
    """Return the candidate's plan as levels."""
    return context.grid.levels(candidate.plan)


def changes(context: SearchContext, here: Levels, base: Levels) -> str:
    """Return the largest changes of `here` against `base`, shares compared: `a3+1 m5-2`."""
    gaps = context.space.shares(here) - context.space.shares(base)
    order = sorted(np.argwhere(gaps).tolist(), key=lambda x: (-abs(gaps[x[0], x[1]]), x))
    words = [f"{'am'[b]}{i}{here[i][b] - base[i][b]:+d}" for i, b in order[:_CHANGES]]
    return " ".join(words) if words else "no changes"


def _units(context: SearchContext) -> str:
    grid, space = context.grid, context.space
    (a_low, a_high), (m_low, m_high) = space.bounds
    name = "KV groups" if grid.unit == "kv_group" else "query heads a group"
    attention = f"Attention keeps {grid.attention[a_low]} to {grid.attention[a_high]} {name}"
    if a_low == a_high:
        attention = f"Attention keeps {grid.attention[a_high]} {name}, fixed"
    elif grid.attention[a_high] - grid.attention[a_low] > a_high - a_low:
        allowed = ", ".join(map(str, grid.attention[a_low : a_high + 1]))
        attention = f"Attention keeps one of {allowed} {name}, one unit being one step along these"
    step = grid.mlp_step
    return f"{attention}; an MLP keeps {m_low + 1} to {m_high + 1} steps of {step} channels."


def _units_kept(context: SearchContext, level: int) -> int:
    return context.grid.attention[level]


def _shows(context: SearchContext, fact: str) -> bool:
    return context.strategy is not None and fact in context.strategy.shows
