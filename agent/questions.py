"""The questions that operators ask the driver: what they show, and what a reply comes to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent import briefing, parse, population, wording
from agent.candidate import Candidate
from agent.conversation import Question
from agent.parse import Bounds, Move, Vectors
from agent.projection import Levels
from agent.reply import ReplyError
from agent.state import SearchContext
from agent.view import View

_SAID = {
    "why": "a short reason",
    "hypothesis": "what this improves, and why",
    "lesson": "what the effects so far teach",
}


@dataclass(frozen=True)
class Slot:
    """A place for one plan: its generation, its number there, its operator and its parents."""

    generation: int
    index: int
    operator: str
    parents: tuple[Candidate, ...] = ()


def plan_question(context: SearchContext, slot: Slot) -> Question[Levels]:
    """Return the prompt for a plan and how to read its reply."""
    assert context.strategy is not None
    form, words = context.strategy.forms[slot.operator], context.strategy.words(slot.operator)
    bounds = context.reply_bounds
    plans = [briefing.levels(context, x) for x in slot.parents] or [context.first_plan]
    readers: dict[str, tuple[parse.Schema, Callable[[str], Levels]]] = {
        "vectors": (
            parse.vectors_schema(bounds, words),
            lambda text: _from_vectors(context, parse.parse_vectors(text, bounds, words)),
        ),
        "moves": (
            parse.moves_schema(bounds, words),
            lambda text: _from_moves(context, plans[0], parse.parse_moves(text, bounds, words)),
        ),
        "mix": (
            parse.mix_schema(bounds, words),
            lambda text: _from_mix(context, plans, parse.parse_mix(text, bounds, words)),
        ),
    }
    schema, read = readers[form]
    base = context.disguise.rows(plans[0])
    view = View(context, slot.generation, form, base, slot.parents)
    more = {
        "hint": context.strategy.hint(slot.index),
        "example": _compact({**_said(words), **_example(bounds, form)}),
    }
    messages = wording.messages(view, slot.operator, more)
    return Question(slot.index, slot.operator, messages, schema, more["example"], read)


def parents_question(
    context: SearchContext, slot: Slot, listed: Sequence[Candidate], wanted: int
) -> Question[tuple[int, ...]]:
    """Return the question which candidates become parents of the slot's generation."""
    assert context.strategy is not None
    words = context.strategy.words("select")
    view = View(context, slot.generation, "select", [], listed=tuple(listed))
    # Changes are told against the plan that stands first, which may be so in disguise only.
    listed = wording.standpoint(view, "select").ranked(listed)
    view, ids = replace(view, base=view.levels(listed[0])), [x.id for x in listed]
    more = {
        "wanted": str(wanted),
        "example": _compact({**_said(words), "parents": ids[-wanted:]}),
    }
    return Question(
        slot.index,
        "select",
        wording.messages(view, "select", more),
        parse.select_schema(ids, wanted, words),
        more["example"],
        lambda text: parse.parse_select(text, ids, wanted, words),
    )


def _example(bounds: Bounds, form: str) -> dict[str, Any]:
    """Return the answer of a tiny reply of this form."""
    last = bounds.layers - 1
    if form == "moves":
        move = {"block": "mlp", "take_from": last // 2, "give_to": min(1, last), "units": 2}
        return {"moves": [move]}
    if form == "mix":
        return {"from_second": sorted({0, last // 3, last // 2})}
    low, high = bounds.percent
    numbers = [round(low + (high - low) * x) for x in (0.1, 0.4, 0.3)]
    return dict.fromkeys(parse.keys(form, bounds), numbers)


def _said(words: Sequence[str]) -> dict[str, str]:
    """Return examples of free text; they claim nothing about the model."""
    return {name: _SAID[name] for name in words}


def _from_vectors(context: SearchContext, reply: Vectors) -> Levels:
    rows = context.disguise.true_rows(list(zip(reply.attention, reply.mlp, strict=True)))
    return context.space.project(1 - np.array(rows, dtype=np.float64) / 100)


def _from_moves(context: SearchContext, parent: Levels, moves: Sequence[Move]) -> Levels:
    """Return `parent` after the moves of a reply, each as far as the layers allow.

    Raises:
        ReplyError: none of the moves changes anything.
    """
    levels, problems = parent, []
    for move in moves:
        block = 0 if move.block == "attention" else 1
        low, high = context.space.bounds[block]
        giver, taker = map(context.disguise.true_layer, (move.take_from, move.give_to))
        spare, room = levels[giver][block] - low, high - levels[taker][block]
        if spare <= 0 or room <= 0:
            layer, word = (move.take_from, "least") if spare <= 0 else (move.give_to, "most")
            problems.append(f"{move.block} {layer} already keeps the {word}")
            continue
        size = min(move.units, spare, room)
        levels = population.shifted(levels, giver, block, -size)
        levels = population.shifted(levels, taker, block, size)
    if len(problems) == len(moves):
        raise ReplyError(f"None of the moves is possible: {problems[0]}.")
    return context.conform(context.space.settle(levels))


def _from_mix(context: SearchContext, plans: Sequence[Levels], layers: Sequence[int]) -> Levels:
    """Return the first plan with some layers of a reply from the second."""
    chosen = {context.disguise.true_layer(i) for i in layers}
    mixed = [plans[1][i] if i in chosen else x for i, x in enumerate(plans[0])]
    return context.conform(context.space.settle(mixed))


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))
