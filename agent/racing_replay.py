"""What racing would have done to a recorded search: saved scores, and what they cost.

Shapes: G generations, P plans of one generation, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agent.racing import Floats, mean, race
from agent.settings import RacingSettings


@dataclass(frozen=True)
class Replay:
    """A recorded search, raced.

    Attributes:
        share: of the pairs of plan and sequence that were scored, 0 to 1.
        agreement: share of the generations after which the best plan was the one that scoring
            everything finds.
        losses: by generation, how much worse the best plan's fitness was than that of scoring
            everything, 0 where they agree; in units of the fitness.
    """

    share: float
    agreement: float
    losses: tuple[float, ...]


def replay(generations_GPS: Sequence[Floats], settings: RacingSettings) -> Replay:
    """Return what racing would have done to the plans of a search, all of which were scored fully.

    As in a search, the best complete plan so far is the rival of every later generation. The
    plans themselves are taken as recorded, although a search that raced might have gone on from
    others.
    """
    rival: Floats | None = None
    least, pairs, losses = np.inf, 0, []
    for table in generations_GPS:
        rows = race(
            lambda chosen, columns, table=table: table[list(chosen), columns.start : columns.stop],  # type: ignore[misc]
            [np.array([])] * len(table),
            table.shape[1],
            settings,
            rival,
        )
        pairs += sum(map(len, rows))
        complete = [x for x in rows if len(x) == table.shape[1]]
        complete += [] if rival is None else [rival]
        rival = min(complete, key=mean)
        least = min(least, *map(mean, table))
        losses.append(mean(rival) - least)
    agreement = sum(x == 0 for x in losses) / max(len(losses), 1)
    return Replay(pairs / max(sum(x.size for x in generations_GPS), 1), agreement, tuple(losses))
