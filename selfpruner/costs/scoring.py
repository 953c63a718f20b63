"""What scoring plans computes: forward passes, references of the dense model, cuts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfpruner.config import RunConfig
from selfpruner.costs import surgery
from selfpruner.costs.surgery import Shapes
from selfpruner.costs.work import Running, Work, times


@dataclass(frozen=True)
class Scoring:
    """Scoring of one run.

    Attributes:
        config: of the run.
        dense, pruned: both models in the precision of the run.
        caches_plans: whether cuts are kept from plan to plan.
        step: MLP channels between two allowed widths.
    """

    config: RunConfig
    dense: Running
    pruned: Running
    caches_plans: bool
    step: int

    def references(self, tokens: int) -> list[Work]:
        """Return what the dense model predicts, once: its own pass, then two with the head."""
        length = self.config.data.length
        return [
            self.dense.passes(tokens, length, 1, head=2 * tokens)
            for name in self.config.text_terms
            if name != "perplexity"
        ]

    def scores(self, count: int, tokens: int) -> list[Work]:
        """Return `count` plans on `tokens` tokens each, every text term meeting the head."""
        if not self.config.text_terms:
            return []
        head = len(self.config.text_terms) * tokens
        one = self.pruned.passes(
            tokens, self.config.data.length, self.config.evaluation.batch_size, head=head
        )
        return [times(one, count)]

    def cuts(self, count: int) -> list[Work]:
        """Return the triangular solves of least-squares cuts.

        Where the cuts of a plan are kept, a level is solved once; else every cut of a plan is
        solved anew for every round of a race.
        """
        settings, shapes = self.config.pruning, Shapes.of(self.dense.architecture)
        if settings.reconstruction != "least_squares" or settings.statistics == "sequential":
            return []
        if self.caches_plans:
            made = min(count, math.ceil(self.dense.architecture.mlp / self.step))
        else:
            racing = self.config.search.racing
            made = count * (1 if racing.is_off else len(racing.rounds))
        return [surgery.cuts(shapes, self.pruned.kept, made)]
