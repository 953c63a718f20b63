"""A surrogate of fitness that makes plans; it decides nothing, every plan is scored.

Pruning losses are taken as additive: a plan's is the sum over blocks of scale_b * loss_b(level),
loss_b the curves of `loss_curves`. Additivity fails where much is cut (EvoPress, arXiv 2410.14649,
table 1), so the scales are learned from what is scored: plans of one generation have seen the same
sequences, and how much each departs from their mean is what a Bayesian linear regression explains.
Levels of whole generations say more of their sequences than of their plans and are left out.
Shapes: N plans, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from agent import briefing
from agent.loss_curves import Curves, loss_curves
from agent.projection import Floats
from agent.racing import NOT_FINITE
from agent.state import SearchContext

_MOST = 512  # plans it is fitted to, the latest ones
_SPREADS = (0.1, 0.2, 0.4, 0.8)  # of the blocks' scales around 1
_UNTAUGHT = 0.2  # the same before anything is scored
_NOISES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08)  # what is not explained, in shares of the fitness
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)  # of the fitness that pruning causes
_ROUNDS = 2  # the losses of a generation's mean depend on the scales that are looked for
_LEAST = 0.05  # least scale


@dataclass(frozen=True)
class Surrogate:
    """A normal distribution over the scales of blocks.

    Attributes:
        curves: `[layer][block]` losses by level.
        mean: scales (B,) that are thought likeliest.
        covariance: of the scales, (B, B).
        unit: fitness that a unit of scaled loss is worth.
        offset: fitness without any loss.
    """

    curves: Curves
    mean: Floats
    covariance: Floats
    unit: float = 1.0
    offset: float = 0.0

    def predict(self, levels: Sequence[tuple[int, int]]) -> float:
        """Return the fitness that a plan is thought to have; lower is better."""
        return float(self.offset + self.unit * (self.scales @ _losses(self.curves, levels)))

    def sampled(self, rng: np.random.Generator) -> Surrogate:
        """Return a surrogate drawn from this one, of which it is certain (Thompson sampling)."""
        drawn = rng.multivariate_normal(self.mean, self.covariance, method="eigh")
        none = np.zeros_like(self.covariance)
        return Surrogate(self.curves, drawn, none, self.unit, self.offset)

    def table(self) -> list[list[list[float]]]:
        """Return `[layer][block][level]` what keeping a level adds to the fitness."""
        scales = self.unit * self.scales.reshape(len(self.curves), 2)
        return [
            [(scale * curve).tolist() for scale, curve in zip(row, pair, strict=True)]
            for row, pair in zip(scales, self.curves, strict=True)
        ]

    @property
    def scales(self) -> Floats:
        """The likeliest scales (B,), above 0: no block is thought to be free."""
        scales: Floats = np.maximum(self.mean, _LEAST)
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
    past = [x for x in context.ledger.candidates() if x.generation < generation]
    known = [x for x in past if x.fitness < NOT_FINITE][-_MOST:]
    one_window = context.settings.window is None
    return fit(
        loss_curves(context.sensitivity, context.ledger.probes()),
        [briefing.levels(context, x) for x in known],
        [x.fitness for x in known],
        [float(x.charge) for x in known],
        [0 if one_window else x.generation for x in known],
    )


def fit(
    curves: Curves,
    plans: Sequence[Sequence[tuple[int, int]]],
    fitness: Sequence[float],
    shares: Sequence[float],
    windows: Sequence[int] | None = None,
) -> Surrogate:
    """Return the posterior of the scales given scored plans.

    With y the fitness over the mean of its window, less 1, and x the losses less their window's
    mean, over the window's mean total loss: y = share * x @ scales + noise. Beforehand the scales
    are 1, give or take a spread. The spread, the noise and the share of the fitness that pruning
    causes are those of a small grid that make the data likeliest.

    Args:
        curves: losses by level.
        plans: levels of the plans, may be empty.
        fitness: of each plan, finite.
        shares: of the sequences that each has seen, above 0 to 1.
        windows: on which each was scored; None: all on one.
    """
    num_blocks = 2 * len(curves)
    prior = Surrogate(curves, np.ones(num_blocks), _UNTAUGHT**2 * np.eye(num_blocks))
    if not len(plans):
        return prior
    y_N = np.array(fitness, dtype=np.float64)
    losses_NB = np.array([_losses(curves, x) for x in plans])
    member_GN = _members([0] * len(plans) if windows is None else windows)
    totals_N = losses_NB.sum(axis=1)
    if np.ptp(y_N) <= 1e-12 * np.abs(y_N).max() or np.ptp(totals_N) == 0 or len(y_N) < 2:
        return _levelled(prior, y_N, losses_NB, 1.0)
    level_N = _means(member_GN, y_N)
    sound = np.where(np.abs(level_N) > 0, np.abs(level_N), 1.0)
    target_N = (y_N - level_N) / sound
    weight_N = np.sqrt(np.array(shares))
    model, share = prior, 1.0
    for _ in range(_ROUNDS):
        scale_N = np.maximum(_means(member_GN, losses_NB @ model.scales), 1e-300)
        x_NB = (losses_NB - _means(member_GN, losses_NB)) / scale_N[:, None]
        mean_B, covariance_BB, share = _posterior(weight_N[:, None] * x_NB, weight_N * target_N)
        model = Surrogate(curves, mean_B, covariance_BB)
    return _levelled(model, y_N, losses_NB, share)


def _levelled(model: Surrogate, y_N: Floats, losses_NB: Floats, share: float) -> Surrogate:
    """Return the model with the unit and the offset that meet the plans in the mean."""
    level = float(y_N.mean())
    total = float((losses_NB @ model.scales).mean())
    unit = share * abs(level) / total if total > 0 and level else 1.0
    offset = level - unit * total
    return Surrogate(model.curves, model.mean, model.covariance, unit, offset)


def _members(windows: Sequence[int]) -> Floats:
    """Return (windows, N) weights that take the mean of each window."""
    names = np.array(windows)
    member: NDArray[np.bool_] = np.unique(names)[:, None] == names
    weights: Floats = member / member.sum(axis=1, keepdims=True)
    return weights


def _means(member_GN: Floats, rows: Floats) -> Floats:
    """Return for each row the mean over the rows of its window."""
    means: Floats = (member_GN > 0).T @ (member_GN @ rows)
    return means


def _posterior(x_NB: Floats, y_N: Floats) -> tuple[Floats, Floats, float]:
    """Return mean and covariance of the scales, and the share, that make the data likeliest.

    All of the grid are judged by one eigendecomposition of x x'.
    """
    values_N, basis_NN = np.linalg.eigh(x_NB @ x_NB.T)
    told_N, prior_N = basis_NN.T @ y_N, basis_NN.T @ x_NB.sum(axis=1)
    grid = np.array(list(product(_SPREADS, _NOISES, _SHARES)))
    spread_G1, noise_G1, share_G1 = (column[:, None] for column in grid.T)
    variance_GN = (share_G1 * spread_G1) ** 2 * np.maximum(values_N, 0) + noise_G1**2
    rest_GN = told_N - share_G1 * prior_N
    evidence_G = -0.5 * (rest_GN**2 / variance_GN + np.log(variance_GN)).sum(axis=1)
    best = int(np.argmax(evidence_G))
    spread, _, share = grid[best].tolist()
    gain_BN = share * spread**2 * (x_NB.T @ basis_NN)
    covariance_BB = spread**2 * np.eye(x_NB.shape[1]) - (gain_BN / variance_GN[best]) @ gain_BN.T
    return 1 + gain_BN @ (rest_GN[best] / variance_GN[best]), covariance_BB, share


def _losses(curves: Curves, levels: Sequence[tuple[int, int]]) -> Floats:
    """Return the loss of every block (B,) of a plan, layer by layer, attention before MLP."""
    return np.array([pair[b][x[b]] for pair, x in zip(curves, levels, strict=True) for b in (0, 1)])
