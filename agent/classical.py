"""The classical allocators: how plans are made and parents chosen without an LLM.

Each is a pure function of the ledger, the slot and a random generator, so that a resumed search
goes on as if it had never stopped. All of them see the same scores and the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from agent import descent, population
from agent.candidate import Candidate
from agent.cma import sampled_shares
from agent.knapsack import knapsack
from agent.projection import Levels
from agent.questions import Slot
from agent.state import SearchContext
from agent.surrogate import surrogate

Generator = np.random.Generator

_WARM_UP = 4  # mutations in a row that make a first plan out of the seed plan


class Classical(Protocol):
    """One allocator's ways; `crosses` says whether pairs of parents have offspring."""

    crosses: bool

    def parents(
        self, pool: Sequence[Candidate], wanted: int, rng: Generator
    ) -> Sequence[Candidate]:
        """Return whom the next generation descends from, favourite first; none for samplers.

        `pool` is sorted by fitness and not empty; `wanted` is at most its length.
        """

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return a plan for `slot`; `attempt` counts those that turned out to be known already."""

    def ancestors(self, context: SearchContext, slot: Slot) -> tuple[Candidate, ...]:
        """Return whom that plan descends from, for the record."""


class Random:
    """Plans of random rates, each drawn anew (control C2: random on the simplex)."""

    crosses = False

    def parents(
        self, pool: Sequence[Candidate], wanted: int, rng: Generator
    ) -> Sequence[Candidate]:
        """Return none."""
        del pool, wanted, rng
        return ()

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return a plan of random rates around the target."""
        del slot, attempt
        return population.random_plan(context.space, rng, context.settings.granularity)

    def ancestors(self, context: SearchContext, slot: Slot) -> tuple[Candidate, ...]:
        """Return none."""
        del context, slot
        return ()


class RandomSeeded(Random):
    """Random neighbours of the seed plan, never of each other (control C3)."""

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return the seed plan after 1 to 12 mutations, more after failures."""
        del slot
        return _mutated(context, context.first_plan, int(rng.integers(1, 13)) + attempt, rng)


class Genetic:
    """Generations of crossover and mutation, parents by tournament (the paper's sizes: C5)."""

    crosses = True

    def parents(
        self, pool: Sequence[Candidate], wanted: int, rng: Generator
    ) -> Sequence[Candidate]:
        """Return the best one, then winners of tournaments of two."""
        return [pool[i] for i in population.tournament([x.fitness for x in pool], wanted, rng)]

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return a first plan, a child of two parents, or a neighbour of one."""
        plans = [context.grid.levels(x.plan) for x in slot.parents]
        if slot.operator == "crossover":
            space, granularity = context.space, context.settings.granularity
            child = population.crossover(plans[0], plans[1], space, rng, granularity)
            return _mutated(context, child, attempt // 4, rng)
        if slot.operator == "mutate":
            return _mutated(context, plans[0], 1 + attempt // 4, rng)
        if not context.settings.seed_plan:
            return population.random_plan(context.space, rng, context.settings.granularity)
        return _mutated(context, context.first_plan, _WARM_UP + attempt, rng)

    def ancestors(self, context: SearchContext, slot: Slot) -> tuple[Candidate, ...]:
        """Return the parents that were chosen for the slot."""
        del context
        return slot.parents


class Evolution(Genetic):
    """One parent, the best so far, and its neighbours by level switches.

    The (1 + lambda) search of EvoPress (arXiv 2410.14649, algorithm 1); lambda is `crossover +
    mutate`, its selection in stages is `search.racing.survivors` (C4). In windows the parent is
    scored beside its offspring on the tokens of their generation, as there.
    """

    crosses = False

    def parents(
        self, pool: Sequence[Candidate], wanted: int, rng: Generator
    ) -> Sequence[Candidate]:
        """Return the best one."""
        del wanted, rng
        return pool[:1]


class Cma(Evolution):
    """Covariance matrix adaptation on kept shares, projected onto the budget (C6)."""

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return the projection of a sample; a known one is moved on by mutations."""
        if slot.generation == 0:
            return super().plan(context, slot, rng, attempt)
        shares = sampled_shares(context, slot.generation, slot.index)
        return _mutated(context, context.conform(context.space.project(shares)), attempt, rng)


class Guided(Genetic):
    """Plans of least predicted fitness, exact under a surrogate that learns from every score.

    The first plan of a generation is the best one under what is thought likeliest, the others
    under draws of what may be (Thompson sampling), so that what is not known is tried as well.
    """

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return the knapsack's plan; later attempts draw a surrogate anew, then mutate as well."""
        model = surrogate(context, slot.generation)
        if slot.generation == 0 or attempt > 0:
            model = model.sampled(rng)
        levels = context.conform(knapsack(context.space, model.table()))
        return _mutated(context, levels, attempt // 8, rng)


class Descent(Evolution):
    """Steps of different lengths from the best plan so far, downhill along its slopes."""

    def plan(self, context: SearchContext, slot: Slot, rng: Generator, attempt: int) -> Levels:
        """Return the best plan within a damping; later attempts draw another, then mutate."""
        levels = descent.step(context, slot, rng)
        if levels is None:
            return CLASSICAL["guided"].plan(context, slot, rng, attempt)
        return _mutated(context, levels, attempt // 8, rng)

    def ancestors(self, context: SearchContext, slot: Slot) -> tuple[Candidate, ...]:
        """Return the plan that steps are taken from, whoever chose the slot's parents."""
        if not descent.known(context, slot.generation):
            return CLASSICAL["guided"].ancestors(context, slot)
        return tuple(descent.footing(context, slot.generation))


CLASSICAL: dict[str, Classical] = {
    "random": Random(),
    "random_seeded": RandomSeeded(),
    "genetic": Genetic(),
    "evolution": Evolution(),
    "cma": Cma(),
    "guided": Guided(),
    "descent": Descent(),
}


def operators_of(context: SearchContext) -> Classical:
    """Return who proposes where no LLM does."""
    return CLASSICAL[context.settings.classical]


def _mutated(context: SearchContext, levels: Levels, times: int, rng: Generator) -> Levels:
    for _ in range(times):
        levels = population.mutate(levels, context.space, rng, context.settings.granularity)
    return levels
