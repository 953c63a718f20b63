"""The fitness of a search, shared out to workers: the same numbers as in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pruning.plan import Grid, Plan
from pruning.slopes import Slopes
from pruning.spool import Spool
from selfpruner.blocks import Block, blocks
from selfpruner.crew import Crew, outcomes
from selfpruner.fitness import Fitness
from selfpruner.stopping import raise_if_asked

Floats = NDArray[np.float64]

_TRIES = 3  # a batch that three workers died over would kill a fourth


class SharedFitness:
    """A `Score` whose blocks a crew computes; accuracy, slopes and length are this process's own.

    A worker that dies is replaced and only its block is scored again; one that dies after a stop
    was asked for, as the signal to a whole group of processes makes it, ends the search.
    """

    def __init__(
        self,
        own: Fitness,
        crew: Crew[Block, Floats],
        batch_size: int,
        tell: Callable[[str], None],
    ) -> None:
        self._own, self._crew, self._batch_size, self._tell = own, crew, batch_size, tell

    @property
    def num_sequences(self) -> int:
        """Search sequences there are."""
        return self._own.num_sequences

    @property
    def has_slopes(self) -> bool:
        """Whether what plans lose on text is known to first order."""
        return self._own.has_slopes

    def accuracy(self, plan: Plan) -> float:
        """Return the share of commonsense items that `plan` answers rightly."""
        return self._own.accuracy(plan)

    def slopes(
        self, plan: Plan, grid: Grid, sequences: Sequence[int], spool: Spool | None = None
    ) -> Slopes:
        """Return what every level of `grid` would add to the fitness of `plan`."""
        return self._own.slopes(plan, grid, sequences, spool)

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> Floats:
        """Return the fitness (P, S) of every plan on every sequence asked for.

        Raises:
            ValueError: a worker could not open its model, or three died over one block.
            KeyboardInterrupt: one died after a signal had asked for a stop.
        """
        scores = np.zeros((len(plans), len(sequences)))
        each = 1 if self._own.goes_layer_by_layer else 2
        workers = len(self._crew.numbers)
        tasks = blocks(plans, sequences, workers, self._batch_size, each=each)
        for block, found in outcomes(tasks, self._crew, self._again()):
            columns = slice(block.start, block.start + len(block.sequences))
            scores[list(block.rows), columns] = found
        return scores

    def _again(self) -> Callable[[Block], bool]:
        """Return what lets a block be scored again until it has been tried too often."""
        deaths: Counter[Block] = Counter()

        def again(block: Block) -> bool:
            raise_if_asked()
            deaths[block] += 1
            if deaths[block] == _TRIES:
                raise ValueError(
                    f"--workers: {_TRIES} workers died over one batch of {len(block.plans)} "
                    "plans; is there memory for so many models?"
                )
            self._tell("a worker died; its batch is scored again")
            return True

        return again
