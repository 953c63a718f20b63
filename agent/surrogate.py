"""A surrogate of fitness that filters proposals; it decides nothing.

Fitness is taken as additive: base + sum over blocks of scale_b * loss_b(level), loss_b the curves
of `loss_curves`. Additivity fails where much is cut (EvoPress, arXiv 2410.14649, table 1), so the
scales are learned from what is scored, most of all from the best plans, and every plan that goes
forward is scored like any other. Shapes: N plans, B blocks, W = B + 2 weights (base, common scale,
what each block's scale adds to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from agent import briefing
from agent.loss_curves import Curves, loss_curves
from agent.projection import Floats, Levels
from agent.racing import NOT_FINITE
from agent.state import SearchContext

_MOST = 256  # plans it is fitted to, the fittest ones
_DIFFERENCES = (0.1, 0.3, 1.0)  # spread of the blocks' scales, in common scales
_MISFITS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # variance not explained, in variances of the fitness
_ROUNDING = 1e-6  # differences of fitness below this share of it are no news
_LEAST = 0.05  # of the common scale: no block is thought to be free


@dataclass(frozen=True)
class Surrogate:
    """A normal distribution over weights.

    Attributes:
        curves: `[layer][block]` losses by level.
        mean: weights (W,) that are thought likeliest.
        covariance: of the weights, (W, W).
    """

    curves: Curves
    mean: Floats
    covariance: Floats

    def predict(self, levels: Sequence[tuple[int, int]]) -> float:
        """Return the fitness that a plan is thought to have; lower is better."""
        return float(self.mean[0] + self._scales @ _losses(self.curves, levels))

    def sampled(self, rng: np.random.Generator) -> Surrogate:
        """Return a surrogate drawn from this one, of which it is certain (Thompson sampling)."""
        drawn = rng.multivariate_normal(self.mean, self.covariance, method="eigh")
        return Surrogate(self.curves, drawn, np.zeros_like(self.covariance))

    def table(self) -> list[list[list[float]]]:
        """Return `[layer][block][level]` what keeping a level adds to the fitness."""
        scales = self._scales.reshape(len(self.curves), 2)
        return [
            [(scale * curve).tolist() for scale, curve in zip(row, pair, strict=True)]
            for row, pair in zip(scales, self.curves, strict=True)
        ]

    @property
    def _scales(self) -> Floats:
        """Return the scale of every block (B,), above 0."""
        common = abs(float(self.mean[1]))
        scales: Floats = np.maximum(self.mean[1] + self.mean[2:], _LEAST * common)
        return scales


def surrogate(context: SearchContext, generation: int) -> Surrogate:
    """Return what probes and earlier generations say; a pure function of the ledger.

    It is the same for all proposals of a generation, so that each generation fits it once.
    """
    if generation not in context.surrogates:
        context.surrogates.clear()
        context.surrogates[generation] = _fitted(context, generation)
    return context.surrogates[generation]


def _fitted(context: SearchContext, generation: int) -> Surrogate:
    ledger = context.ledger
    known = [x for x in ledger.best(_MOST, before=generation) if x.fitness < NOT_FINITE]
    return fit(
        loss_curves(context.sensitivity, ledger.probes()),
        [briefing.levels(context, x) for x in known],
        [x.fitness for x in known],
        [float(x.charge) for x in known],
    )


def best_of(model: Surrogate, proposals: Sequence[Levels]) -> Levels:
    """Return the proposal of least predicted fitness, the first of equal ones."""
    return min(proposals, key=model.predict)


def fit(
    curves: Curves,
    plans: Sequence[Levels],
    fitness: Sequence[float],
    shares: Sequence[float],
) -> Surrogate:
    """Return the posterior of the weights given scored plans.

    Bayesian linear regression: the prior of the common scale makes the losses explain the whole
    level of fitness, give or take as much again, that of a block's own part is a share of it. A
    plan's variance is what an additive model cannot explain, times 1 + d^2 / m^2 for its distance
    d to the best plan and the median distance m, so that the model is right where the search is,
    divided by the share of the sequences that the plan has seen. That variance and the spread of
    the blocks' scales are those of a small grid that make the data likeliest.

    Args:
        curves: losses by level.
        plans: levels of the plans, may be empty.
        fitness: of each plan, finite.
        shares: of the sequences that each has seen, above 0 to 1.
    """
    y_N = np.array(fitness, dtype=np.float64)
    losses_NB = np.array([_losses(curves, x) for x in plans]).reshape(len(y_N), 2 * len(curves))
    x_NW = np.column_stack([np.ones(len(y_N)), losses_NB.sum(axis=1), losses_NB])
    mean_W, variance_W = _prior(x_NW, y_N)
    if len(y_N) < 2 or np.ptp(y_N) == 0:
        return Surrogate(curves, mean_W, np.diag(_spread(variance_W, _DIFFERENCES[1])))
    distance = y_N - y_N.min()
    noise_N = (1 + (distance / np.median(distance[distance > 0])) ** 2) / np.array(shares)
    centre = np.average(y_N, weights=1 / noise_N)
    unit = float(np.average((y_N - centre) ** 2, weights=1 / noise_N))
    unit = max(unit, (_ROUNDING * float(np.abs(y_N).max())) ** 2)
    tried = [
        _posterior(x_NW, y_N, mean_W, _spread(variance_W, spread), misfit * unit * noise_N)
        for spread, misfit in product(_DIFFERENCES, _MISFITS)
    ]
    _, mean_W, covariance_WW = max(tried, key=lambda x: x[0])
    return Surrogate(curves, mean_W, covariance_WW)


def _prior(x_NW: Floats, y_N: Floats) -> tuple[Floats, Floats]:
    """Return mean and variance of the weights beforehand, as if the blocks' parts spread by 1."""
    mean_W, total = np.zeros(x_NW.shape[1]), float(x_NW[:, 1].mean()) if len(y_N) else 0.0
    level = float(np.abs(y_N).mean()) if len(y_N) else 0.0
    mean_W[1] = level / total if total > 0 and level > 0 else 1.0
    mean_W[0] = float(y_N.mean()) - mean_W[1] * total if len(y_N) else 0.0
    variance_W = np.full(len(mean_W), mean_W[1] ** 2)
    variance_W[0] = max(level, 1e-12) ** 2
    return mean_W, variance_W


def _spread(variance_W: Floats, spread: float) -> Floats:
    """Return the variances with the blocks' own parts spread by `spread` common scales."""
    return np.concatenate([variance_W[:2], spread**2 * variance_W[2:]])


def _posterior(
    x_NW: Floats, y_N: Floats, mean_W: Floats, variance_W: Floats, noise_N: Floats
) -> tuple[float, Floats, Floats]:
    """Return log evidence, mean and covariance after normal observations of variance `noise_N`."""
    gain_WN = variance_W[:, None] * x_NW.T
    factor_NN = np.linalg.cholesky(x_NW @ gain_WN + np.diag(noise_N))
    half_NW = np.linalg.solve(factor_NN, gain_WN.T)
    rest_N = np.linalg.solve(factor_NN, y_N - x_NW @ mean_W)
    evidence = -0.5 * float(rest_N @ rest_N) - float(np.log(np.diag(factor_NN)).sum())
    covariance_WW = np.diag(variance_W) - half_NW.T @ half_NW
    return evidence, mean_W + half_NW.T @ rest_N, (covariance_WW + covariance_WW.T) / 2


def _losses(curves: Curves, levels: Sequence[tuple[int, int]]) -> Floats:
    """Return the loss of every block (B,) of a plan, layer by layer, attention before MLP."""
    return np.array([pair[b][x[b]] for pair, x in zip(curves, levels, strict=True) for b in (0, 1)])
