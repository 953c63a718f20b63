"""Proposals of one generation: by the LLM where it is asked and able, else by NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent import population
from agent.bandit import draws_llm, takes_turn
from agent.candidate import Candidate, Origin
from agent.classical import operators_of
from agent.conversation import Answer, ask
from agent.projection import Levels
from agent.questions import Slot, parents_question, plan_question
from agent.settings import SearchSettings
from agent.standing import ranked
from agent.state import SearchContext

_RETRIES = 24


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
            "slot": self.slot.index,
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
    only where a limit forbade to ask the LLM, or the classical operator finds no new plan in a
    bounded number of tries. The first generation has one plan at least.

    Raises:
        DriverError: all drivers gave up and `driver.when_down` is stop.
    """
    seen = {x.key for x in context.ledger.candidates() if x.generation < generation} | {*pending}
    made = _begun(context, slots, seen) if generation == 0 else {}
    asked = [s for s in slots if s.index not in made and is_asked(context, s)]
    answers = ask(context, generation, [plan_question(context, s) for s in asked])
    given = {s.index: a for s, a in zip(asked, answers, strict=True)}
    for slot in slots:
        proposal = made.get(slot.index) or _settled(
            context, generation, slot, given.get(slot.index), seen
        )
        if proposal is not None:
            made[slot.index] = proposal
    if generation == 0 and not made:
        made[slots[0].index] = _first(context, slots[0], seen)
    return [made[s.index] for s in slots if s.index in made]


def _begun(context: SearchContext, slots: Sequence[Slot], seen: set[str]) -> dict[int, Proposal]:
    """Return what the first generation begins with, as far as there are slots.

    The seed plan, plans handed in, simple plans; in a single slot a plan handed in comes first.
    """
    seed = [context.first_plan] if context.settings.seed_plan else []
    handed = [context.conform(context.grid.levels(x)) for x in context.starts]
    simple = [context.simple_plan(x) for x in context.settings.starts]
    made: dict[int, Proposal] = {}
    for levels in (*seed, *handed, *simple) if len(slots) > 1 else (*handed, *seed, *simple):
        key = context.grid.plan(levels).key
        if key not in seen and len(made) < len(slots):
            seen.add(key)
            slot = slots[len(made)]
            made[slot.index] = Proposal(slot, "heuristic", levels)
    return made


def _first(context: SearchContext, slot: Slot, seen: set[str]) -> Proposal:
    """Return the plan that a search begins with."""
    seen.add(context.grid.plan(context.first_plan).key)
    return Proposal(slot, "heuristic", context.first_plan)


def choose_parents(context: SearchContext, generation: int, slot: int) -> list[Candidate]:
    """Return the candidates that the next generation descends from, distinct, favourite first.

    They are as many as a prompt lists, or half of the population where no LLM is asked.
    """
    settings = context.settings
    pool = ranked(context, settings.population, generation)
    most = settings.shown if settings.asks_llm else settings.population // 2
    wanted = min(len(pool), max(2, most))
    place = Slot(generation, slot, "select")
    if wanted > 1 and len(pool) > 2 and is_asked(context, place):
        listed = pool[: max(2 * wanted, settings.shown)]
        answer = ask(context, generation, [parents_question(context, place, listed, wanted)])[0]
        if answer.value is not None:
            by_id = {x.id: x for x in listed}
            chosen = [by_id[i] for i in answer.value]
            return _paired(context, chosen, listed)
    rng = population.generator(context.seed, generation, slot)
    return list(operators_of(context).parents(pool, wanted, rng))


def _paired(
    context: SearchContext, chosen: list[Candidate], listed: Sequence[Candidate]
) -> list[Candidate]:
    """Return the chosen, with the best other one where pairs have offspring and it is but one."""
    pairs = operators_of(context).crosses and context.settings.crossover > 0
    if len(chosen) > 1 or not pairs:
        return chosen
    return chosen + [x for x in listed if x not in chosen][:1]


def is_asked(context: SearchContext, slot: Slot) -> bool:
    """Return whether the LLM is asked for a slot: a share of the plans and of the parents.

    The one plan that windows end a search with is classical where there is a classical share.
    """
    share = context.settings.share_asked
    if share != 1 and context.spending.is_last(slot.generation):
        return False
    if share == "learned":
        candidates = context.ledger.candidates()
        return draws_llm(candidates, context.seed, slot.generation, slot.index)
    return takes_turn(_number(context.settings, slot), share)


def _number(settings: SearchSettings, slot: Slot) -> int:
    """Return how many plans, or choices of parents, come before a slot in the whole search."""
    later = slot.generation - 1
    if slot.operator == "select":
        return later
    brood = settings.crossover + settings.mutate
    return slot.index if later < 0 else settings.population + later * brood + slot.index


def _settled(
    context: SearchContext,
    generation: int,
    slot: Slot,
    answer: Answer[Levels] | None,
    seen: set[str],
) -> Proposal | None:
    """Return the LLM's plan, or the classical operator's where there is none or it is known."""
    tokens = 0 if answer is None else answer.tokens
    if answer is not None and not answer.asked:
        return None
    if answer is not None and answer.value is not None:
        key = context.grid.plan(answer.value).key
        if key not in seen:
            seen.add(key)
            by: Origin = "llm_repaired" if answer.repaired else "llm"
            return Proposal(slot, by, answer.value, tokens)
    origin: Origin = "classical" if answer is None else "fallback"
    allocator = operators_of(context)
    for attempt in range(_RETRIES):
        rng = population.generator(context.seed, generation, slot.index, attempt)
        levels = allocator.plan(context, slot, rng, attempt)
        key = context.grid.plan(levels).key
        if key not in seen:
            seen.add(key)
            bred = replace(slot, parents=allocator.ancestors(context, slot))
            return Proposal(bred, origin, levels, tokens)
    return None
