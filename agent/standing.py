"""Where candidates stand: by their fitness or, in windows, by all that is known of them.

A plan that was scored on one window of a few sequences may have been lucky there. What the
surrogate has learned from all plans says as much of it as its own score does, so the two are
combined: a plan stands at its prediction plus a part of the gap that its score leaves to it, beside
its generation's. With s the standard error of scores and t^2 what gaps vary by more than that, the
part is t^2 / (t^2 + s^2) (empirical Bayes, Efron and Morris, 1975). An elitist search takes scores
as they are: each of its plans met its parent on the same sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent import briefing
from agent.candidate import Candidate
from agent.racing import NOT_FINITE
from agent.state import SearchContext
from agent.surrogate import surrogate

_TINY = 1e-300


def ranked(
    context: SearchContext, count: int, before: int | None = None, *, complete: bool = False
) -> list[Candidate]:
    """Return the `count` best candidates, of generations before `before` if given.

    `complete` asks for those that have seen all sequences of their window only.
    """
    if context.settings.window is None or context.settings.is_elitist:
        return context.ledger.best(count, before, complete=complete)
    pool = context.ledger.best(len(context.ledger.candidates()), before, complete=complete)
    sound = [x for x in pool if x.fitness < NOT_FINITE]
    last = max((x.generation for x in pool), default=-1) + 1
    places = dict(zip((x.id for x in sound), _standings(context, sound, last), strict=True))
    return sorted(pool, key=lambda x: (places.get(x.id, NOT_FINITE), x.id))[:count]


def finalists(context: SearchContext) -> list[Candidate]:
    """Return the best candidates, and last the first plan of all where it is not among them.

    They are scored on fresh tokens: a search that was misled ends no worse than it began.
    """
    best = ranked(context, context.settings.finalists, complete=True)
    first = context.ledger.candidates()[0]
    return best if first in best or not first.is_complete else [*best, first]


def leaders(context: SearchContext) -> list[tuple[int, Candidate]]:
    """Return `(generation, candidate)`: the best complete one as it stood after each generation."""
    numbers = sorted({x.generation for x in context.ledger.candidates()})
    return [(n, x) for n in numbers for x in ranked(context, 1, n + 1, complete=True)]


def _standings(
    context: SearchContext, candidates: Sequence[Candidate], generation: int
) -> list[float]:
    """Return what each plan's fitness is thought to be before `generation`; lower is better."""
    if not candidates:
        return []
    model = surrogate(context, generation)
    predicted_N = np.array([model.predict(briefing.levels(context, x)) for x in candidates])
    gaps_N = np.array([x.fitness for x in candidates]) - predicted_N
    numbers = np.array([x.generation for x in candidates])
    for number in np.unique(numbers):
        gaps_N[numbers == number] -= gaps_N[numbers == number].mean()
    noise_N = model.error**2 / np.array([float(x.charge) for x in candidates])
    own = max(0.0, float((gaps_N**2 - noise_N).mean()))
    standings: list[float] = (predicted_N + gaps_N * own / (own + noise_N + _TINY)).tolist()
    return standings
