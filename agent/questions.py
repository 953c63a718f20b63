"""The questions that operators ask the driver: what they show, and what a reply comes to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent import briefing, parse, population
from agent.candidate import Candidate
from agent.conversation import DuplicateError, Question
from agent.parse import Bounds, Move, ReplyError, Vectors
from agent.projection import Levels
from agent.state import SearchContext


@dataclass(frozen=True)
class Slot:
    """A place for one plan: its generation, its number there, its operator and its parents."""

    generation: int
    index: int
    operator: str
    parents: tuple[Candidate, ...] = ()


def plan_question(context: SearchContext, slot: Slot, seen: set[str]) -> Question[Levels]:
    """Return the prompt for a plan and how to read its reply.

    A reply whose plan is among the keys `seen` is a duplicate; an accepted one is added to them.
    """
    assert context.strategy is not None
    form = context.strategy.forms[slot.operator]
    bounds = context.reply_bounds
    plans = [briefing.levels(context, x) for x in slot.parents] or [context.first_plan]
    readers: dict[str, tuple[parse.Schema, Callable[[str], Levels]]] = {
        "vectors": (
            parse.vectors_schema(bounds),
            lambda text: _from_vectors(context, parse.parse_vectors(text, bounds)),
        ),
        "moves": (
            parse.moves_schema(bounds),
            lambda text: _from_moves(context, plans[0], parse.parse_moves(text, bounds)),
        ),
        "mix": (
            parse.mix_schema(bounds),
            lambda text: _from_mix(context, plans, parse.parse_mix(text, bounds)),
        ),
    }
    schema, read = readers[form]

    def interpret(text: str) -> Levels:
        levels = read(text)
        key = context.grid.plan(levels).key
        if key in seen:
            raise DuplicateError(f"plan {key} was proposed before")
        seen.add(key)
        return levels

    messages = _messages(context, slot.operator, _values(context, slot, plans))
    return Question(slot.index, slot.operator, messages, schema, interpret)


def parents_question(
    context: SearchContext, slot: int, listed: Sequence[Candidate], wanted: int
) -> Question[tuple[int, ...]]:
    """Return the question which of the listed candidates become parents."""
    ids = [x.id for x in listed]
    best = briefing.levels(context, listed[0])
    values = {
        "candidates": briefing.differences(context, listed, best),
        "wanted": str(wanted),
        "example": _compact({"parents": ids[-wanted:]}),
    }
    return Question(
        slot,
        "select",
        _messages(context, "select", values),
        parse.select_schema(ids, wanted),
        lambda text: parse.parse_select(text, ids, wanted),
    )


def _messages(
    context: SearchContext, text: str, values: dict[str, str]
) -> tuple[dict[str, str], ...]:
    assert context.strategy is not None
    values = {**briefing.common(context), **values}
    return (
        {"role": "system", "content": context.strategy.render("system", values)},
        {"role": "user", "content": context.strategy.render(text, values)},
    )


def _values(context: SearchContext, slot: Slot, plans: Sequence[Levels]) -> dict[str, str]:
    """Return what the prompt of a slot shows beyond the common facts."""
    assert context.strategy is not None
    operator, form = slot.operator, context.strategy.forms[slot.operator]
    shown_count = context.settings.shown
    pool = context.ledger.best(shown_count + 2, before=slot.generation)
    others = [x for x in pool if x not in slot.parents]
    others = others[:shown_count]
    values = {
        "sensitivity": briefing.sensitivity(context),
        "hint": context.strategy.hint(slot.index),
        "example": _example(context.reply_bounds, form),
    }
    if form == "vectors":
        shown = [
            f"{briefing.header(context, x)}\n{briefing.vectors(context, y)}"
            for x, y in zip(slot.parents, plans, strict=False)
        ] or [briefing.vectors(context, plans[0])]
        values["candidates"] = briefing.full(context, others)
    else:
        shown = [f"{briefing.header(context, x)}" for x in slot.parents]
        values["candidates"] = briefing.differences(context, others, plans[0])
    values["candidates"] = values["candidates"] or "none"
    if operator == "crossover":
        values["first"], values["second"] = shown
        if form == "mix":
            values["second"] += "\n" + briefing.rows_that_differ(context, plans[0], plans[1])
    elif form == "moves":
        values["parent"] = "\n".join([*shown, briefing.table(context, plans[0])])
    else:
        values["parent"] = shown[0]
    return values


def _example(bounds: Bounds, form: str) -> str:
    """Return a tiny reply of this form."""
    last = bounds.layers - 1
    if form == "moves":
        move = {"block": "mlp", "take_from": last // 2, "give_to": min(1, last), "units": 2}
        return _compact({"moves": [move]})
    if form == "mix":
        return _compact({"from_second": sorted({0, last // 3, last // 2})})
    names = ("attention", "mlp") if bounds.blocks else ("rates",)
    low, high = bounds.percent
    numbers = [round(low + (high - low) * x) for x in (0.1, 0.4, 0.3)]
    return _compact(dict.fromkeys(names, numbers))


def _from_vectors(context: SearchContext, reply: Vectors) -> Levels:
    removed = np.array([reply.attention, reply.mlp], dtype=np.float64).T
    return context.space.project(1 - removed / 100)


def _from_moves(context: SearchContext, parent: Levels, moves: Sequence[Move]) -> Levels:
    """Return `parent` after the moves, each as far as the layers allow.

    Raises:
        ReplyError: none of the moves changes anything.
    """
    levels, problems = parent, []
    for move in moves:
        block = 0 if move.block == "attention" else 1
        low, high = context.space.bounds[block]
        spare = levels[move.take_from][block] - low
        room = high - levels[move.give_to][block]
        if spare <= 0 or room <= 0:
            layer, word = (move.take_from, "least") if spare <= 0 else (move.give_to, "most")
            problems.append(f"{move.block} {layer} already keeps the {word}")
            continue
        size = min(move.units, spare, room)
        levels = population.shifted(levels, move.take_from, block, -size)
        levels = population.shifted(levels, move.give_to, block, size)
    if len(problems) == len(moves):
        raise ReplyError(f"None of the moves is possible: {problems[0]}.")
    return context.conform(context.space.settle(levels))


def _from_mix(context: SearchContext, plans: Sequence[Levels], layers: Sequence[int]) -> Levels:
    mixed = [plans[1][i] if i in set(layers) else x for i, x in enumerate(plans[0])]
    return context.conform(context.space.settle(mixed))


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))
