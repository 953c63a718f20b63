"""Fitness: plans and search sequences in, one number a plan and sequence out, lower is better.

Shapes: P plans, S sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.choices import EncodedChoices, choice_margins
from evaluators.divergence import DenseReference, TopReference, negative_log_likelihood
from pruning.elastic import ElasticModel
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.families import Family
from pruning.plan import Grid, Plan
from pruning.slopes import Slopes, stream_slopes
from pruning.spool import Spool
from pruning.streaming import final_states, is_streamed
from selfpruner.config import TEXT_TERMS
from selfpruner.latency_table import LatencyTable

_SCALE = 2.0**12  # of losses on their way back: their gradients in float16 would come to nothing


class Runs(Protocol):
    """Anything that runs plans: the elastic model, or one finished model for any plan."""

    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(plan index, normed final hidden states (B, T, D))` in any order."""


class Judge(Protocol):
    """A fitness on a fixed number of sequences, wherever it is computed."""

    @property
    def num_sequences(self) -> int:
        """Sequences there are."""

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        """Return the fitness (P, S) of every plan on every sequence asked for."""


class Finished:
    """One model with its own weights, whatever the plan says."""

    def __init__(self, model: nn.Module, family: Family, batch_size: int) -> None:
        self._model, self._family, self._batch_size = model, family, batch_size

    @torch.no_grad()
    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the same hidden states for every plan."""
        batches = tokens_BT.split(self._batch_size)
        hidden = torch.cat(final_states(self._model, self._family, batches))
        yield from ((index, hidden) for index in range(len(plans)))


class Fitness:
    """A weighted sum of terms on fixed sequences: the `Score` of the search.

    `kl` and `kl_top512` are divergences from the dense model in nats a token. `perplexity` is
    scored as its logarithm, the mean cross-entropy. `accuracy` is the negative margin of
    commonsense items, in nats a character, and `latency` the predicted share of the dense time;
    both are the same for every sequence of a plan.
    """

    def __init__(
        self,
        runs: Runs,
        dense: nn.Module,
        family: Family,
        weights: Mapping[str, float],
        tokens_ST: Tensor,
        *,
        choices: EncodedChoices | None = None,
        speed: LatencyTable | None = None,
        batch_size: int = 8,
    ) -> None:
        self._runs, self._dense, self._family = runs, dense, family
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._tokens, self._batch_size = tokens_ST, batch_size
        self._choices, self._speed = choices, speed
        self._references: dict[tuple[str, int], DenseReference | TopReference] = {}
        self._of_plans: dict[Plan, float] = {}  # a race asks for a plan round by round

    @property
    def num_sequences(self) -> int:
        """Search sequences there are."""
        return len(self._tokens)

    @property
    def has_slopes(self) -> bool:
        """Whether what plans lose on text is known to first order."""
        terms = any(name in self._weights for name in TEXT_TERMS)
        return terms and isinstance(self._runs, ElasticModel)

    @property
    def goes_layer_by_layer(self) -> bool:
        """Whether each layer is read, or its cuts made, once a call for all plans and sequences."""
        return is_streamed(self._dense) or isinstance(self._runs, LayerwiseElastic)

    def of(self, runs: Runs) -> Fitness:
        """Return the same fitness for something else that runs, sharing the dense references."""
        other = Fitness(
            runs,
            self._dense,
            self._family,
            self._weights,
            self._tokens,
            choices=self._choices,
            speed=self._speed,
            batch_size=self._batch_size,
        )
        other._references = self._references
        return other

    @torch.no_grad()
    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        """Return the fitness (P, S) of every plan on every sequence asked for."""
        scores = np.zeros((len(plans), len(sequences)))
        if any(name in self._weights for name in TEXT_TERMS):
            self._refer(sequences)
            # What goes layer by layer makes its own micro-batches.
            step = max(1, len(sequences)) if self.goes_layer_by_layer else self._batch_size
            for start in range(0, len(sequences), step):
                chosen = sequences[start : start + step]
                columns = slice(start, start + len(chosen))
                for row, hidden in self._runs.hidden_states(plans, self._tokens[list(chosen)]):
                    scores[row, columns] = self._text_terms(chosen, hidden)
        for row, plan in enumerate(plans):
            if plan not in self._of_plans:
                self._of_plans[plan] = self._plan_terms(plan)
            scores[row] += self._of_plans[plan]
        return scores

    @torch.no_grad()
    def slopes(
        self, plan: Plan, grid: Grid, sequences: Sequence[int], spool: Spool | None = None
    ) -> Slopes:
        """Return what every level of `grid` would add to the fitness of `plan`, to first order.

        In the mean over the sequences asked for, 0 at the plan's own levels, `accuracy` left out;
        `spool` takes the inputs of the layers.

        Raises:
            ValueError: a gradient is not finite.
        """
        assert isinstance(self._runs, ElasticModel), "ask has_slopes first"
        self._refer(sequences)
        chosen = list(sequences)

        def gradient(rows: range, hidden_BTD: Tensor) -> Tensor:
            found = [self._gradient(chosen[i], x) for i, x in zip(rows, hidden_BTD, strict=True)]
            return torch.stack(found) / len(chosen)

        scaled = stream_slopes(
            self._runs,
            plan,
            grid,
            self._tokens[chosen],
            gradient,
            batch_size=self._batch_size,
            spool=spool,
        )
        found = [
            ([x / _SCALE for x in attention], [x / _SCALE for x in mlp])
            for attention, mlp in scaled
        ]
        return self._with_latency(found, grid, plan)

    def accuracy(self, plan: Plan) -> float:
        """Return the share of commonsense items that `plan` answers rightly.

        Raises:
            ValueError: no items were given.
        """
        return float(self._margins(plan)[1].mean())

    def _text_terms(self, sequences: Sequence[int], hidden_BTD: Tensor) -> NDArray[np.float64]:
        """Return the weighted text terms of one plan on a micro-batch of sequences (B,)."""
        total = np.zeros(len(sequences))
        for row, sequence in enumerate(sequences):
            for weight, losses in self._losses(sequence, hidden_BTD[row, :-1]):
                total[row] += weight * float(losses.double().mean())
        return total

    def _losses(self, sequence: int, hidden_TD: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield the weight and the loss at each token of every text term; no token is the last."""
        head = self._family.head(self._dense)
        for name in TEXT_TERMS:
            if name not in self._weights:
                continue
            if name == "perplexity":
                targets = self._tokens[sequence, 1:].to(hidden_TD.device)
                losses = negative_log_likelihood(hidden_TD, head, targets)
            else:
                losses = self._references[name, sequence].kl(hidden_TD)
            yield self._weights[name], losses

    def _gradient(self, sequence: int, last_TD: Tensor) -> Tensor:
        """Return the gradient (T, D) of the scaled text terms where the last layer ends."""
        with torch.enable_grad():
            last = last_TD.detach().requires_grad_()
            hidden = self._family.final_norm(self._dense)(last)
            losses = [weight * x.mean() for weight, x in self._losses(sequence, hidden[:-1])]
            (gradient,) = torch.autograd.grad(_SCALE * torch.stack(losses).sum(), last)
        return gradient

    def _refer(self, sequences: Sequence[int]) -> None:
        """Run the dense model on the sequences that no reference is there for yet."""
        kinds = {"kl": DenseReference, "kl_top512": TopReference}
        head = self._family.head(self._dense)
        for name in kinds.keys() & self._weights.keys():
            new = [x for x in dict.fromkeys(sequences) if (name, x) not in self._references]
            rows = [self._tokens[x : x + 1] for x in new]
            for sequence, hidden in zip(
                new, final_states(self._dense, self._family, rows) if rows else [], strict=True
            ):
                self._references[name, sequence] = kinds[name](hidden[0, :-1], head)

    def _plan_terms(self, plan: Plan) -> float:
        total = 0.0
        if weight := self._weights.get("accuracy"):
            total -= weight * float(self._margins(plan)[0].mean())
        if weight := self._weights.get("latency"):
            assert self._speed is not None
            total += weight / self._speed.speedup(plan)
        return total

    def _with_latency(self, slopes: Slopes, grid: Grid, plan: Plan) -> Slopes:
        """Return the slopes with what the levels add to the weighted share of the dense time."""
        weight = self._weights.get("latency")
        if not weight:
            return slopes
        assert self._speed is not None
        times, dense = self._speed.times(grid), 1e6 * self._speed.dense_milliseconds
        found = []
        for pair, levels in zip(slopes, grid.levels(plan), strict=True):
            attention, mlp = (
                [
                    slope + weight * (time - row[own]) / dense
                    for slope, time in zip(block, row, strict=True)
                ]
                for block, row, own in zip(pair, (times.attention, times.mlp), levels, strict=True)
            )
            found.append((attention, mlp))
        return found

    def _margins(self, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        if self._choices is None:
            raise ValueError("data.choices: got 0, want at least 1 for accuracy in the search")

        def trunk(batches: Sequence[Tensor]) -> Iterator[Tensor]:
            runs = self._runs
            if isinstance(runs, LayerwiseElastic):  # makes its cuts anew at each call
                ((_, hidden),) = runs.hidden_batches([plan], batches)
                yield from hidden
                return
            for tokens_BT in batches:
                ((_, hidden_BTD),) = runs.hidden_states([plan], tokens_BT)
                yield hidden_BTD

        return choice_margins(trunk, self._family.head(self._dense), self._choices)
