"""Scores of the plans that wait: raced on the search sequences, summed up for the ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.candidate import Scores
from agent.racing import NOT_FINITE, Floats, is_broken, mean, race
from agent.state import SearchContext
from pruning.plan import Plan

_DIGITS = 9  # those of a float32


def score_pending(
    context: SearchContext, generation: int, pending: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the scores of each pending plan, and its share of the seconds.

    The plans race each other and the best complete candidate of earlier generations. What the
    ledger has is not scored again.
    """
    known = [context.ledger.find(x["key"]) for x in pending]
    plans = [Plan.from_json(x["genotype"]) for x in pending]
    rival = _rival(context, generation)
    start = context.clock()
    rows = race(
        lambda chosen, columns: values(context, [plans[i] for i in chosen], columns),
        [np.array([]) if x is None else x.values for x in known],
        len(context.sequences),
        context.settings.racing,
        rival,
    )
    seconds = (context.clock() - start) / max(known.count(None), 1)
    scores = summaries(rows, len(context.sequences), rival)
    return [
        {**(fresh if x is None else x.scores), "seconds": seconds if x is None else x.seconds}
        for x, fresh in zip(known, scores, strict=True)
    ]


def values(context: SearchContext, plans: Sequence[Plan], columns: range) -> Floats:
    """Return the fitness (P, N) of plans on sequences by position, rounded to a float32's digits.

    What is not finite becomes `NOT_FINITE`, the worst. Everything later is computed from these
    numbers, which JSON gives back as they are.

    Raises:
        ValueError: the score came in another shape.
    """
    table = context.score(plans, [context.sequences[i] for i in columns])
    if table.shape != (len(plans), len(columns)):
        raise ValueError(f"score: got shape {table.shape}, want ({len(plans)}, {len(columns)})")
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
