"""Proposals of one generation: by the LLM where it is asked and able, else by NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent import briefing, parse, population
from agent.candidate import Candidate, Origin
from agent.conversation import Answer, DuplicateError, Question, ask
from agent.parse import Bounds, Move, ReplyError, Vectors
from agent.projection import Levels
from agent.state import SearchContext

_RETRIES = 24
_WARM_UP = 4  # mutations in a row that make a first plan out of the seed plan


@dataclass(frozen=True)
class Slot:
    """A place for one plan in a generation: its number, its operator and its parents."""

    index: int
    operator: str
    parents: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """A plan that waits for its score."""

    slot: Slot
    origin: Origin
    levels: Levels
    tokens: int = 0

    def to_json(self, context: SearchContext) -> dict[str, Any]:
        """Return plain JSON data for the state."""
        plan = context.grid.plan(self.levels)
        return {
            "operator": self.slot.operator,
            "origin": self.origin,
            "parents": [x.id for x in self.slot.parents],
            "genotype": plan.to_json(),
            "key": plan.key,
            "tokens": self.tokens,
        }


def propose(
    context: SearchContext, generation: int, slots: Sequence[Slot], pending: Sequence[str]
) -> list[Proposal]:
    """Return new distinct plans for `slots`, at most one each, in the order of slots.

    `pending`: keys of plans of this generation that other operators proposed. A slot stays empty
    only where the classical operator finds no new plan in a bounded number of tries.
    """
    seen = {x.key for x in context.ledger.candidates() if x.generation < generation} | {*pending}
    made: dict[int, Proposal] = {}
    if generation == 0 and context.settings.seed_plan and slots:
        seen.add(context.grid.plan(context.first_plan).key)
        made[slots[0].index] = Proposal(slots[0], "heuristic", context.first_plan)
    asked = [s for i, s in enumerate(slots) if s.index not in made and _asks(context, i)]
    answers = ask(context, generation, [_question(context, s, seen) for s in asked])
    given = {s.index: a for s, a in zip(asked, answers, strict=True)}
    for slot in slots:
        proposal = made.get(slot.index) or _settled(
            context, generation, slot, given.get(slot.index), seen
        )
        if proposal is not None:
            made[slot.index] = proposal
    return [made[s.index] for s in slots if s.index in made]


def choose_parents(context: SearchContext, generation: int, slot: int) -> list[Candidate]:
    """Return the candidates that the next generation descends from, distinct, favourite first."""
    settings = context.settings
    pool = context.ledger.best(settings.population, before=generation)
    wanted = min(len(pool), max(2, settings.shown))
    if wanted > 1 and len(pool) > 2 and _asks(context, generation - 1):
        listed = pool[: max(2 * wanted, settings.shown)]
        answer = ask(context, generation, [_selection(context, slot, listed, wanted)])[0]
        if answer.value is not None:
            by_id = {x.id: x for x in listed}
            return [by_id[i] for i in answer.value]
    rng = population.generator(context.seed, generation, slot)
    return [pool[i] for i in population.tournament([x.fitness for x in pool], wanted, rng)]


def _asks(context: SearchContext, index: int) -> bool:
    """Return whether the LLM is asked for number `index`; the classical share is spread evenly."""
    if context.settings.allocator != "llm":
        return False
    share = context.settings.classical_share
    return int((index + 1) * share + 1e-9) == int(index * share + 1e-9)


def _settled(
    context: SearchContext,
    generation: int,
    slot: Slot,
    answer: Answer[Levels] | None,
    seen: set[str],
) -> Proposal | None:
    """Return the LLM's plan, or the classical operator's where there is none."""
    tokens = 0 if answer is None else answer.tokens
    if answer is not None and answer.value is not None:
        return Proposal(slot, "llm_repaired" if answer.repaired else "llm", answer.value, tokens)
    origin: Origin = "classical" if answer is None else "fallback"
    for attempt in range(_RETRIES):
        rng = population.generator(context.seed, generation, slot.index, attempt)
        levels = _classical(context, slot, rng, attempt)
        key = context.grid.plan(levels).key
        if key not in seen:
            seen.add(key)
            return Proposal(slot, origin, levels, tokens)
    return None


def _classical(
    context: SearchContext, slot: Slot, rng: np.random.Generator, attempt: int
) -> Levels:
    """Return the classical operator's plan; late attempts go further away."""
    space, granularity = context.space, context.settings.granularity
    plans = [briefing.levels(context, x) for x in slot.parents]
    repeats = 1 + attempt // 4
    if slot.operator == "crossover":
        child = population.crossover(plans[0], plans[1], space, rng, granularity)
        repeats = attempt // 4
    elif slot.operator == "mutate":
        child = plans[0]
    elif context.settings.allocator == "random" or slot.index % 2:
        return population.random_plan(space, rng, granularity)
    else:
        child, repeats = context.first_plan, _WARM_UP + attempt
    for _ in range(repeats):
        child = population.mutate(child, space, rng, granularity)
    return child


def _question(context: SearchContext, slot: Slot, seen: set[str]) -> Question[Levels]:
    """Return the prompt of a slot and how to read its reply."""
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

    messages = _messages(context, slot.operator, _values(context, slot, form, plans))
    return Question(slot.index, slot.operator, messages, schema, interpret)


def _selection(
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


def _values(
    context: SearchContext, slot: Slot, form: str, plans: Sequence[Levels]
) -> dict[str, str]:
    """Return what the prompt of a slot shows beyond the common facts."""
    assert context.strategy is not None
    others = [x for x in context.ledger.best(context.settings.shown + 1) if x not in slot.parents]
    others = others[: context.settings.shown]
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
    if slot.operator == "crossover":
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
        ReplyError: a move is not possible at all.
    """
    levels = parent
    for number, move in enumerate(moves, 1):
        block = 0 if move.block == "attention" else 1
        low, high = context.space.bounds[block]
        spare = levels[move.take_from][block] - low
        room = high - levels[move.give_to][block]
        if spare <= 0 or room <= 0:
            layer, word = (move.take_from, "least") if spare <= 0 else (move.give_to, "most")
            raise ReplyError(f"Move {number}: {move.block} {layer} already keeps the {word}.")
        size = min(move.units, spare, room)
        levels = population.shifted(levels, move.take_from, block, -size)
        levels = population.shifted(levels, move.give_to, block, size)
    return context.conform(context.space.settle(levels))


def _from_mix(context: SearchContext, plans: Sequence[Levels], layers: Sequence[int]) -> Levels:
    mixed = [plans[1][i] if i in set(layers) else x for i, x in enumerate(plans[0])]
    return context.conform(context.space.settle(mixed))


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))
