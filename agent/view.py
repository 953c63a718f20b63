"""What a prompt may look back on: candidates of earlier generations, seen from one plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from agent import briefing
from agent.candidate import Candidate
from agent.projection import Levels
from agent.state import SearchContext
from prompts.library import Form


@dataclass(frozen=True)
class View:
    """The standpoint of a prompt; two equal ledgers of earlier generations give equal words.

    Attributes:
        context: of the search.
        generation: of the proposal; only candidates and replies of earlier ones are told.
        form: of the reply; plans are told as vectors there, else as changes against `base`.
        base: the plan that the prompt shows, in the order in which layers are told.
        parents: candidates that the prompt shows anyway.
        listed: candidates that the prompt lists, where they are given.
        shown: candidates of which the prompt tells the fitness; a disguise mixes it among them.
    """

    context: SearchContext
    generation: int
    form: Form
    base: Levels
    parents: tuple[Candidate, ...] = ()
    listed: tuple[Candidate, ...] = ()
    shown: tuple[Candidate, ...] = ()

    @cached_property
    def past(self) -> dict[int, Candidate]:
        """Candidates of earlier generations by id, in the order of scoring."""
        candidates = self.context.ledger.candidates()
        return {x.id: x for x in candidates if x.generation < self.generation}

    def origin_of(self, candidate: Candidate) -> Candidate | None:
        """Return what a past proposal changed: its first parent or, for moves, the seed plan."""
        if candidate.parents:
            return self.past.get(candidate.parents[0])
        strategy = self.context.strategy
        if strategy is None or strategy.forms.get(candidate.operator) != "moves":
            return None
        seed = self.context.ledger.find(self.context.grid.plan(self.context.first_plan).key)
        return None if seed is None or seed.id == candidate.id else self.past.get(seed.id)

    def levels(self, candidate: Candidate) -> Levels:
        """Return the candidate's plan in the order in which layers are told."""
        return self.context.disguise.rows(briefing.levels(self.context, candidate))

    def seen(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the fitness, accuracy and speedup that it is told with."""
        lender = self._lenders.get(candidate.id, candidate)
        scores, accuracy, speedup = lender.scores, lender.accuracy, lender.speedup
        return replace(candidate, scores=scores, accuracy=accuracy, speedup=speedup)

    def bearer(self, candidate: Candidate) -> Candidate:
        """Return who is told with the fitness of `candidate`, as seen."""
        return self.seen(self._bearers.get(candidate.id, candidate))

    def ranked(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return candidates by the fitness that they are told with, the best first; ties stay."""
        return sorted(candidates, key=lambda x: self.seen(x).fitness)

    def header(self, candidate: Candidate) -> str:
        """Return the candidate's number, its fitness and what else may be told of it."""
        return briefing.header(self.context, self.seen(candidate))

    def plan(self, candidate: Candidate) -> str:
        """Return the candidate's plan as this prompt tells plans."""
        levels = self.levels(candidate)
        if self.form == "vectors":
            return briefing.vectors(self.context, levels)
        return briefing.changes(self.context, levels, self.base)

    def told(self, candidate: Candidate) -> str:
        """Return the candidate's fitness, what else may be told of it, and its plan."""
        mark = "\n" if self.form == "vectors" else "; "
        return f"{self.header(candidate)}{mark}{self.plan(candidate)}"

    @cached_property
    def _lenders(self) -> dict[int, Candidate]:
        return self.context.disguise.lenders(self.shown, self.generation)

    @cached_property
    def _bearers(self) -> dict[int, Candidate]:
        known = {x.id: x for x in self.shown}
        return {lender.id: known[i] for i, lender in self._lenders.items()}
