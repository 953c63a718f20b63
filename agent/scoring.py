"""Scores of the plans that wait: raced on the search sequences, summed up for the ledger.

Where generations have windows of their own, one plan of earlier ones, the anchor, is scored on
every window, and a plan's fitness is the anchor's times the mean ratio of the two, sequence by
sequence: what makes a sequence hard or easy cancels, and generations compare. The anchor is the
first plan, in an elitist search the best one so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.candidate import Candidate, Scores
from agent.ledger import Anchor
from agent.racing import NOT_FINITE, Floats, is_broken, mean, race
from agent.state import SearchContext
from pruning.plan import Plan

_DIGITS = 9  # those of a float32


def score_pending(
    context: SearchContext, generation: int, pending: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the scores of each pending plan, and its share of the seconds.

    The plans race each other and the best complete candidate of earlier generations, or the anchor
    on the window of theirs. What the ledger has is not scored again.
    """
    known = [context.ledger.find(x["key"]) for x in pending]
    plans = [Plan.from_json(x["genotype"]) for x in pending]
    seen = [np.array([]) if x is None else x.values for x in known]
    window, start = context.window(generation), context.clock()
    anchor = _anchor(context, generation, plans)
    beside = None if anchor is None else np.array(anchor.values)
    rival = _rival(context, generation) if beside is None else beside
    if beside is not None and generation == 0:
        seen[0], rival = beside, None  # the first plan is one of these
    rows = race(
        lambda chosen, columns: values(
            context, [plans[i] for i in chosen], window[columns.start : columns.stop]
        ),
        seen,
        len(window),
        context.settings.racing,
        rival,
    )
    seconds = (context.clock() - start) / max(known.count(None), 1)
    if anchor is None or beside is None:
        scores = summaries(rows, len(window), rival)
    else:
        scores = _relative(rows, beside, _fitness(context, anchor))
    return [
        {**(fresh if x is None else x.scores), "seconds": seconds if x is None else x.seconds}
        for x, fresh in zip(known, scores, strict=True)
    ]


def values(context: SearchContext, plans: Sequence[Plan], sequences: Sequence[int]) -> Floats:
    """Return the fitness (P, N) of plans on sequences, rounded to a float32's digits.

    What is not finite becomes `NOT_FINITE`, the worst. Everything later is computed from these
    numbers, which JSON gives back as they are.

    Raises:
        ValueError: the score came in another shape.
    """
    table = context.score(plans, sequences)
    if table.shape != (len(plans), len(sequences)):
        raise ValueError(f"score: got shape {table.shape}, want ({len(plans)}, {len(sequences)})")
    table = np.where(np.isfinite(table), table, NOT_FINITE).clip(-NOT_FINITE, NOT_FINITE)
    return np.array([[float(f"{x:.{_DIGITS}g}") for x in row] for row in table.tolist()])


def summaries(rows: Sequence[Floats], num_sequences: int, rival_S: Floats | None) -> list[Scores]:
    """Return the scores of plans that raced, by the values that each has seen.

    A plan that dropped out is given an estimate: the mean of the best complete one, plus the mean
    paired difference to it on the sequences seen, and never less than the best one's mean. Its
    standard error adds up those of the two.
    """
    complete = [x for x in rows if len(x) == num_sequences]
    complete += [] if rival_S is None else [rival_S]
    best = min(complete, key=lambda x: (mean(x), x.tolist()), default=np.array([]))
    return [_summary(x, num_sequences, best) for x in rows]


def _summary(row: Floats, num_sequences: int, best: Floats) -> Scores:
    fitness, stderr = mean(row), _stderr(row)
    if len(row) < num_sequences and not is_broken(row):
        difference = row - best[: len(row)]
        fitness = mean(best)
        if not is_broken(best):
            fitness += max(0.0, mean(difference))
        stderr = math.hypot(_stderr(best), _stderr(difference))
    return {
        "fitness": fitness,
        "stderr": stderr,
        "sequences": len(row),
        "of": num_sequences,
        "values": row.tolist(),
    }


def _relative(rows: Sequence[Floats], anchor_S: Floats, level: float) -> list[Scores]:
    """Return the scores of plans beside the anchor, whose fitness is `level`.

    A plan that dropped out is never fitter than the best complete one.
    """
    scores = [_beside(x, anchor_S, level) for x in rows]
    complete = [x["fitness"] for x in scores if x["sequences"] == len(anchor_S)]
    for x in scores:
        if x["sequences"] < len(anchor_S):
            x["fitness"] = max(x["fitness"], min(complete, default=level))
    return scores


def _beside(row: Floats, anchor_S: Floats, level: float) -> Scores:
    anchor = anchor_S[: len(row)]
    ratios = np.divide(row, anchor, out=np.ones_like(row), where=anchor > 0)
    return {
        "fitness": NOT_FINITE if is_broken(row) else level * mean(ratios),
        "stderr": level * _stderr(ratios),
        "sequences": len(row),
        "of": len(anchor_S),
        "values": row.tolist(),
    }


def _anchor(context: SearchContext, generation: int, pending: Sequence[Plan]) -> Anchor | None:
    """Return what a generation is compared with, on its window; None without windows.

    In the first generation that is its own first plan. What is on file, of an earlier process or
    of a window with the same sequences, is not scored again.
    """
    if context.settings.window is None or not pending:
        return None
    past = context.ledger.anchors()
    if filed := [x for x in past if x.generation == generation]:
        return filed[0]
    window = context.window(generation)
    if generation == 0:
        number, plan, known = 0, pending[0], {}
    else:
        chosen = _compared_with(context, generation)
        number, plan = chosen.id, chosen.plan
        known = dict(zip(context.window(chosen.generation), chosen.values.tolist(), strict=False))
    for x in past:
        if x.candidate == number:
            known |= zip(x.sequences, x.values, strict=True)
    missing = [x for x in window if x not in known]
    if missing:
        known |= zip(missing, values(context, [plan], missing)[0].tolist(), strict=True)
    row_S = tuple(known[x] for x in window)
    anchor = Anchor(generation, number, tuple(window), row_S, len(missing))
    context.ledger.add_anchor(anchor)
    return anchor


def _compared_with(context: SearchContext, generation: int) -> Candidate:
    """Return the candidate of earlier generations that is the anchor of this one."""
    if context.settings.is_elitist:
        return context.ledger.best(1, before=generation, complete=True)[0]
    return context.ledger.candidates()[0]


def _fitness(context: SearchContext, anchor: Anchor) -> float:
    """Return the anchor's fitness: in the first generation its own mean."""
    if anchor.generation == 0:
        return mean(np.array(anchor.values))
    return context.ledger.candidates()[anchor.candidate].fitness


def _stderr(row: Floats) -> float:
    if len(row) < 2 or is_broken(row):
        return 0.0
    return float(np.std(row, ddof=1)) / math.sqrt(len(row))


def _rival(context: SearchContext, generation: int) -> Floats | None:
    """Return the values of the best complete candidate of earlier generations, None without one."""
    best = context.ledger.best(1, before=generation, complete=True)
    if not best or len(best[0].values) != len(context.sequences):
        return None
    return best[0].values
