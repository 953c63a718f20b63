"""Racing: plans meet the same sequences in the same order and drop out once one is clearly better.

Differences on the same sequences vary far less than the scores themselves (racing after Maron and
Moore, 1994, with the paired tests of F-Race, Birattari et al., 2002). Shapes: P plans, N sequences
seen, S all sequences. Values: fitness per sequence, lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.settings import RacingSettings

Floats = NDArray[np.float64]
Columns = Callable[[Sequence[int], range], Floats]

NOT_FINITE = 1e30  # stands for a value that is not finite, the worst
_PRIOR = 4  # degrees of freedom that the pooled variance counts for


def race(
    columns: Columns,
    known: Sequence[Floats],
    num_sequences: int,
    settings: RacingSettings,
    rival_S: Floats | None = None,
) -> list[Floats]:
    """Return the values of every plan: of all sequences, or of the first ones where it dropped out.

    After each round the best plan so far is the one of least mean, the rival included; it may
    change from round to round, since all are compared on the same sequences. A plan drops out
    where the lower bound of its mean paired difference to the best one is above zero, or where
    more plans are left than `settings.survivors` allows (multi-stage selection of EvoPress, arXiv
    2410.14649, section 3). The outcome does not depend on the order of the plans.

    Args:
        columns: plans and sequences, both by position, to their values (P, N).
        known: values of each plan that are on file already; they are not asked for again.
        num_sequences: all sequences.
        settings: rounds and when a plan drops out.
        rival_S: values of the best plan of earlier generations, which all are raced against.
    """
    rows = [np.asarray(x, dtype=np.float64) for x in known]
    alive = list(range(len(rows)))
    for number, stop in enumerate(stops(num_sequences, settings)):
        _extend(columns, rows, alive, stop)
        if stop == num_sequences or not alive:
            break
        table = np.stack([rows[i][:stop] for i in alive])
        stays = ~_is_beaten(table, rival_S, num_sequences, settings.bound)
        alive = [i for i, stay in zip(alive, stays, strict=True) if stay]
        if settings.survivors is not None:
            ranked = sorted(alive, key=lambda i: _rank(rows[i][:stop]))
            alive = sorted(ranked[: settings.survivors[number]])
    return rows


def stops(num_sequences: int, settings: RacingSettings) -> list[int]:
    """Return how many sequences have been seen after each round; the last is all of them."""
    if settings.is_off:
        return [num_sequences]
    ends: list[int] = []
    for share in settings.rounds:
        wanted = math.ceil(share * num_sequences - 1e-9)
        ends.append(min(num_sequences, max(wanted, ends[-1] + 1 if ends else 1)))
        if ends[-1] == num_sequences:
            break
    return ends


def is_broken(values: Floats) -> bool:
    """Return whether a value was not finite."""
    return bool((np.abs(values) >= NOT_FINITE).any())


def mean(values: Floats) -> float:
    """Return the mean, `NOT_FINITE` where a value was not finite."""
    return NOT_FINITE if is_broken(values) else float(np.mean(values))


def _extend(columns: Columns, rows: list[Floats], alive: Sequence[int], stop: int) -> None:
    """Ask for what the plans in the race have not seen up to `stop`, all at once where possible."""
    for start in sorted({len(rows[i]) for i in alive if len(rows[i]) < stop}):
        chosen = [i for i in alive if len(rows[i]) == start]
        for i, more in zip(chosen, columns(chosen, range(start, stop)), strict=True):
            rows[i] = np.concatenate([rows[i], more])


def _is_beaten(
    table_PN: Floats, rival_S: Floats | None, num_sequences: int, bound: float | None
) -> NDArray[np.bool_]:
    """Return which plans are clearly worse than the best one on these sequences.

    The bound is `bound` standard errors below the mean difference. What is to be foreseen is the
    mean over all S sequences, so the standard error is s sqrt(1/N - 1/S). The variance s^2 of the
    few differences seen is shrunk towards that of the generation as in limma (Smyth, 2004):
    (4 pooled + (N - 1) own) / (4 + N - 1), where pooled is the mean over all plans in the race.
    A single sequence tells no variance: nobody drops out. A plan with a value that was not finite
    drops out as soon as another one has none.
    """
    num_plans, seen = table_PN.shape
    beaten = np.zeros(num_plans, dtype=bool)
    if bound is None:
        return beaten
    field = table_PN if rival_S is None else np.vstack([table_PN, rival_S[:seen]])
    best = min(field, key=_rank)
    if is_broken(best):
        return beaten
    sound = np.array([not is_broken(row) for row in field])
    beaten |= ~sound[:num_plans]
    if seen < 2:
        return beaten
    differences = field - best
    own = differences[sound].var(axis=1, ddof=1)
    # The best one's differences to itself say nothing; fsum: the order of plans does not matter.
    pooled = math.fsum(own) / max(len(own) - 1, 1)
    variances = (_PRIOR * pooled + (seen - 1) * own) / (_PRIOR + seen - 1)
    errors = np.sqrt(variances * (1 / seen - 1 / num_sequences))
    worse = differences[sound].mean(axis=1) - bound * errors > 0
    beaten[sound[:num_plans]] |= worse[: int(sound[:num_plans].sum())]
    return beaten


def _rank(values: Floats) -> tuple[float, list[float]]:
    """Return what orders plans on the same sequences: their mean, then the values themselves."""
    return mean(values), values.tolist()
