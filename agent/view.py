"""What a prompt may look back on: candidates of earlier generations, seen from one plan."""

from __future__ import annotations

from dataclasses import dataclass
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
        base: the plan that the prompt shows.
        parents: candidates that the prompt shows anyway.
    """

    context: SearchContext
    generation: int
    form: Form
    base: Levels
    parents: tuple[Candidate, ...] = ()

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

    def plan(self, candidate: Candidate) -> str:
        """Return the candidate's plan as this prompt tells plans."""
        levels = briefing.levels(self.context, candidate)
        if self.form == "vectors":
            return briefing.vectors(self.context, levels)
        return briefing.changes(self.context, levels, self.base)

    def told(self, candidate: Candidate) -> str:
        """Return the candidate's fitness, what else may be told of it, and its plan."""
        mark = "\n" if self.form == "vectors" else "; "
        return f"{briefing.header(self.context, candidate)}{mark}{self.plan(candidate)}"
