"""What a control hides from the LLM: where layers lie, what plans were worth, or the model's name.

Only words change: the ledger, the budget and the classical operators know nothing of it. If a
search gains nothing by the LLM, or gains as much in disguise, the LLM did not use what was hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TypeVar

from agent.candidate import Candidate
from agent.population import generator
from agent.settings import Placebo

T = TypeVar("T")

_STREAM = 5_003  # keeps these draws apart from those of the operators
_NEUTRAL = "a language model"


@dataclass(frozen=True)
class Disguise:
    """A pure function of the search's seed; `none` and what it does not hide stay as they are.

    Attributes:
        placebo: what is hidden.
        seed: of the search.
        layers: number of layers.
    """

    placebo: Placebo
    seed: int
    layers: int

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The true layer behind each told index, the same for the whole search.

        All orders are equally likely, the true one too, so that a told index says nothing.
        """
        if self.placebo != "layers":
            return tuple(range(self.layers))
        return tuple(generator(self.seed, 0, 0, _STREAM).permutation(self.layers).tolist())

    def layer(self, true: int) -> int:
        """Return the index under which a layer is told."""
        return self.order.index(true)

    def true_layer(self, told: int) -> int:
        """Return the layer that a reply means by `told`, the inverse of `layer`."""
        return self.order[told]

    def rows(self, rows: Sequence[T]) -> list[T]:
        """Return one row a layer in the order in which layers are told."""
        return [rows[i] for i in self.order]

    def true_rows(self, rows: Sequence[T]) -> list[T]:
        """Return the rows of a reply in the order of layers, the inverse of `rows`."""
        return [rows[self.layer(i)] for i in range(self.layers)]

    @property
    def is_about_fitness(self) -> bool:
        """Whether candidates are told with each other's fitness, in a random order."""
        return self.placebo == "fitness"

    def lenders(self, shown: Iterable[Candidate], generation: int) -> dict[int, Candidate]:
        """Return by id the candidate whose fitness each of `shown` is told with.

        A random order of a generation: what is told says nothing about who has it, not even that
        it is false.
        """
        own = {x.id: x for x in shown}
        if not self.is_about_fitness:
            return own
        rng, ids = generator(self.seed, generation, 0, _STREAM), sorted(own)
        drawn = rng.permutation(ids).tolist()
        return {i: own[other] for i, other in zip(ids, drawn, strict=True)}

    def model(self, name: str) -> str:
        """Return the last part of the model's name or path, or neutral words."""
        return _NEUTRAL if self.placebo == "name" else PurePath(name).name or _NEUTRAL
