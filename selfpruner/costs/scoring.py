"""What scoring plans computes: forward passes, references of the dense model, cuts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pruning.alignment import Alignment
from selfpruner.config import RunConfig
from selfpruner.costs import surgery
from selfpruner.costs.memory import CACHE_BYTES
from selfpruner.costs.surgery import Shapes
from selfpruner.costs.work import BYTES, Running, Work, times

TEXT_TERMS = ("kl", "kl_top512", "perplexity")


@dataclass(frozen=True)
class Scoring:
    """Scoring of one run.

    Attributes:
        config: of the run.
        dense, pruned: both models in the precision of the run.
    """

    config: RunConfig
    dense: Running
    pruned: Running

    @property
    def terms(self) -> list[str]:
        """Terms of the fitness that meet the vocabulary."""
        return [name for name in TEXT_TERMS if self.config.fitness.get(name)]

    def references(self, tokens: int) -> list[Work]:
        """Return what the dense model predicts, once: its own pass, then two with the head."""
        length = self.config.data.length
        return [
            self.dense.passes(tokens, length, 1, head=2 * tokens)
            for name in self.terms
            if name != "perplexity"
        ]

    def scores(self, count: int, tokens: int) -> list[Work]:
        """Return `count` plans on `tokens` tokens each, every text term meeting the head."""
        if not self.terms:
            return []
        head = len(self.terms) * tokens
        one = self.pruned.passes(
            tokens, self.config.data.length, self.config.evaluation.batch_size, head=head
        )
        return [times(one, count)]

    def cuts(self, count: int, tokens: int) -> list[Work]:
        """Return the triangular solves of least-squares cuts.

        Where the cuts of one plan fit the cache, a level is solved once; where they do not, every
        cut of a plan is solved anew for every micro-batch; where memory is streamed, for every
        round of a race.
        """
        settings, shapes = self.config.pruning, Shapes.of(self.dense.architecture)
        if settings.reconstruction != "least_squares" or settings.statistics == "sequential":
            return []
        width = BYTES[self.dense.precision]
        held = shapes.over_layers(lambda o, n: width * o * n, self.pruned.kept)
        if self.config.memory == "streamed":
            racing = self.config.search.racing
            made = count * (1 if racing.is_off else len(racing.rounds))
        elif held <= CACHE_BYTES:
            step = settings.step or Alignment.of(settings.target).step
            made = min(count, math.ceil(self.dense.architecture.mlp / step))
        else:
            made = count * self._micro_batches(tokens // self.config.data.length)
        return [surgery.cuts(shapes, self.pruned.kept, made)]

    def _micro_batches(self, sequences: int) -> int:
        """Return the micro-batches of one full evaluation, round by round where plans race."""
        racing = self.config.search.racing
        ends = [sequences] if racing.is_off else [math.ceil(x * sequences) for x in racing.rounds]
        starts = [0, *ends[:-1]]
        return sum(
            math.ceil((b - a) / self.config.evaluation.batch_size)
            for a, b in zip(starts, ends, strict=True)
        )
