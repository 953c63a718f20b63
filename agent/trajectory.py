"""The way a search went: past plans with their fitness, and the changes that failed."""

from __future__ import annotations

from agent import briefing
from agent.candidate import Candidate
from agent.view import View

_PAIRS = 8
_FAILED = 4


def history(view: View) -> str:
    """Return the last plans with their fitness, the worst first (OPRO, arXiv 2309.03409)."""
    others = [x for x in view.past.values() if x not in view.parents]
    ordered = sorted(others[-_PAIRS:], key=lambda x: (-x.fitness, x.id))
    return "\n".join(f"{view.plan(x)}; fitness {x.fitness:.4g}" for x in ordered)


def failed(view: View) -> str:
    """Return changes that did not lower the fitness: those of the shown plans, then the latest."""
    parents = {x.id for x in view.parents}
    worse = []
    for candidate in view.past.values():
        before = view.origin_of(candidate)
        if before is not None and candidate.fitness >= before.fitness:
            worse.append((before.id in parents, candidate.id, effect(view, candidate, before)))
    return "\n".join(text for _, _, text in sorted(worse, reverse=True)[:_FAILED])


def effect(view: View, candidate: Candidate, before: Candidate) -> str:
    """Return `m5-2 m9+2: 0.51 -> 0.56`: a change and the fitness before and after it."""
    here, base = (briefing.levels(view.context, x) for x in (candidate, before))
    change = briefing.changes(view.context, here, base)
    return f"{change}: {before.fitness:.4g} -> {candidate.fitness:.4g}"
