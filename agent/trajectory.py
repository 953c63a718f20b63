"""The way a search went: past plans with their fitness, and the changes that failed."""

from __future__ import annotations

from agent import briefing
from agent.candidate import Candidate
from agent.view import View

_PAIRS = 8
_FAILED = 4


def history(view: View) -> str:
    """Return the last plans with their fitness, the worst first (OPRO, arXiv 2309.03409)."""
    told = [view.seen(x) for x in last(view)]
    ordered = sorted(told, key=lambda x: (-x.fitness, x.id))
    return "\n".join(f"{view.plan(x)}; fitness {x.fitness:.4g}" for x in ordered)


def last(view: View) -> list[Candidate]:
    """Return the candidates that the history tells, in the order of scoring."""
    return [x for x in view.past.values() if x not in view.parents][-_PAIRS:]


def failed(view: View) -> str:
    """Return changes that did not lower the fitness: those of the shown plans, then the latest."""
    pairs = [(view.bearer(x), view.bearer(before)) for x, before in failures(view)]
    return "\n".join(effect(view, x, before) for x, before in pairs)


def failures(view: View) -> list[tuple[Candidate, Candidate]]:
    """Return the candidates that `failed` tells, each with what it changed."""
    parents = {x.id for x in view.parents}
    worse = []
    for candidate in view.past.values():
        before = view.origin_of(candidate)
        if before is not None and candidate.fitness >= before.fitness:
            worse.append((candidate, before))
    order = sorted(worse, key=lambda x: (x[1].id in parents, x[0].id), reverse=True)
    return order[:_FAILED]


def effect(view: View, candidate: Candidate, before: Candidate) -> str:
    """Return `m5-2 m9+2: 0.51 -> 0.56`: a change and the fitness before and after it."""
    change = briefing.changes(view.context, view.levels(candidate), view.levels(before))
    return f"{change}: {before.fitness:.4g} -> {candidate.fitness:.4g}"
