"""What ranking, correction and the refit compute, by the shapes of the output projections.

Shapes: O output channels, N input channels of an output projection, k kept of them, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pruning.architecture import Architecture
from pruning.gram import products_per_token
from selfpruner.config import PruningSettings
from selfpruner.costs.work import Work

REFIT_RIDGES = 5  # pruning.refit.RIDGES and pruning.reconstruction.ridge.RIDGES hold five each
RANK_RIDGES = 5


@dataclass(frozen=True)
class Shapes:
    """The two output projections of a layer, (O, N) each, and how many layers have them."""

    outputs: int
    attention: int
    mlp: int
    layers: int

    @classmethod
    def of(cls, architecture: Architecture) -> Shapes:
        """Return the shapes of an architecture."""
        inputs = architecture.heads * architecture.head_dim
        return cls(architecture.hidden, inputs, architecture.mlp, architecture.layers)

    @property
    def inputs(self) -> tuple[int, int]:
        """Input channels of the projections of attention and of the MLP."""
        return self.attention, self.mlp

    def over_layers(self, count: Callable[[int, int], float], kept: float = 1.0) -> float:
        """Return `count(O, N)` summed over all projections of all layers, `kept` of N there."""
        return self.layers * sum(count(self.outputs, round(kept * n)) for n in self.inputs)


def gram(shapes: Shapes, tokens: float) -> Work:
    """Return the Gram matrices of all inputs, 2 T N^2 each in float32, of wide ones less."""
    return Work(flops=shapes.over_layers(lambda _, n: 2 * tokens * products_per_token(n)))


def curvature(shapes: Shapes, tokens: float) -> tuple[Work, ...]:
    """Return the Fisher matrices of all outputs and their roots.

    2 T O^2 each in float32, of wide ones less.
    """
    return (
        Work(flops=shapes.over_layers(lambda o, _: 2 * tokens * products_per_token(o))),
        Work(
            flops=shapes.over_layers(lambda o, _: o**3 / 3),
            precision="float64",
            solves=True,
        ),
    )


def ranking(shapes: Shapes, settings: PruningSettings) -> tuple[Work, ...]:
    """Return what turns statistics into an order, corrections and their errors, in float64.

    Factor of the covariance N^3 / 3, its product with the weights 2 O N^2, its inverse N^3 / 3 and
    what cuts change O N^2 (least squares), or the products of columns 2 O N^2 alone; where errors
    are measured by curvature 4 O^2 N for order and errors; for a block ranked by `obs` one more
    factor, its inverse and the updates after every removal, about 7/3 N^3 + O N^2; with `ridge:
    auto` five factors more, with two cuts compared each.
    """
    corrects = settings.reconstruction == "least_squares"
    solves = shapes.over_layers(lambda _, n: 2 / 3 * n**3) if corrects else 0.0
    products = shapes.over_layers(lambda o, n: (3 if corrects else 2) * o * n * n)
    if settings.fisher_tokens:
        products += shapes.over_layers(lambda o, n: 4 * o * o * n)
    metrics = (settings.attention_metric or settings.metric, settings.metric)
    for metric, n in zip(metrics, shapes.inputs, strict=True):
        if metric == "obs":
            solves += shapes.layers * n**3
            products += shapes.layers * (4 / 3 * n**3 + shapes.outputs * n * n)
    if settings.ridge == "auto" and (corrects or "obs" in metrics):
        solves += RANK_RIDGES * shapes.over_layers(lambda o, n: n**3 / 3 + 5 / 9 * o * n * n)
        products += RANK_RIDGES * shapes.over_layers(lambda o, n: 6 * o * n * n)
    return (
        Work(flops=solves, precision="float64", solves=True),
        Work(flops=products, precision="float64"),
    )


def cuts(shapes: Shapes, kept: float, plans: float) -> Work:
    """Return the least-squares cuts of `plans` plans: a triangular solve of O k^2, in float32."""
    one = shapes.over_layers(lambda o, k: o * k * k, kept)
    return Work(flops=plans * one, solves=True)


def refit(shapes: Shapes, kept: Sequence[float], tokens: float) -> tuple[Work, ...]:
    """Return moments and ridge solutions of every pruned model, a share kept each.

    Moments 2 T k (k + O) in float32, of wide ones less; then, in float64, a factor k^3 / 3 and a
    solution 2 O k^2 for each of five ridges and for the one that is taken, and the held-out error
    2 O k^2 of the five.
    """
    times = REFIT_RIDGES + 1
    return (
        Work(
            flops=sum(
                shapes.over_layers(lambda o, k: 2 * tokens * (products_per_token(k) + k * o), x)
                for x in kept
            )
        ),
        Work(
            flops=sum(
                shapes.over_layers(lambda o, k: times * (k**3 / 3 + 2 * o * k * k), x) for x in kept
            ),
            precision="float64",
            solves=True,
        ),
        Work(
            flops=sum(
                shapes.over_layers(lambda o, k: (REFIT_RIDGES + 2) * 2 * o * k * k, x) for x in kept
            ),
            precision="float64",
        ),
    )
