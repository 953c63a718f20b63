"""A surrogate of fitness that makes plans; every plan is scored all the same.

Pruning losses are taken as additive: a plan's is the sum over blocks of scale_b * loss_b(level),
loss_b the curves of `loss_curves`. Additivity fails where much is cut (EvoPress, arXiv 2410.14649,
table 1), so the scales are learned from what is scored: plans of one generation have seen the same
sequences, and how much each departs from their mean is what a Bayesian linear regression explains.
Levels of whole generations say more of their sequences than of their plans and are left out; what a
generation has in common shows beside the plan that its window was compared with, which is one more.
In windows what it predicts also helps to say where a scored plan stands (`agent.standing`).
Shapes: N plans, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agent import briefing
from agent.candidate import Candidate
from agent.loss_curves import Curves, loss_curves
from agent.projection import Floats
from agent.racing import NOT_FINITE
from agent.state import SearchContext

_MOST = 512  # plans it is fitted to, the latest ones
_SPREAD = 0.5  # of the blocks' scales around 1 beforehand
_MISFIT = 0.02  # of the fitness that no additive model explains, a standard deviation
_ROUNDS = 2  # the losses of a window's mean depend on the scales that are looked for
_LEAST = 0.05  # least scale: no block is thought to be free


@dataclass(frozen=True)
class Surrogate:
    """A normal distribution over the scales of blocks.

    Attributes:
        curves: `[layer][block]` losses by level.
        mean: scales (B,) that are thought likeliest.
        covariance: of the scales, (B, B).
        unit: fitness that a unit of scaled loss is worth.
        offset: fitness without any loss.
        error: standard error of a plan's fitness on a whole window, as fitness.
    """

    curves: Curves
    mean: Floats
    covariance: Floats
    unit: float = 1.0
    offset: float = 0.0
    error: float = 0.0

    def predict(self, levels: Sequence[tuple[int, int]]) -> float:
        """Return the fitness that a plan is thought to have; lower is better."""
        return float(self.offset + self.unit * (self.scales @ _losses(self.curves, levels)))

    def sampled(self, rng: np.random.Generator) -> Surrogate:
        """Return a surrogate drawn from this one, of which it is certain (Thompson sampling)."""
        drawn = rng.multivariate_normal(self.mean, self.covariance, method="eigh")
        return replace(self, mean=drawn, covariance=np.zeros_like(self.covariance))

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
    everyone = context.ledger.candidates()
    past = [x for x in everyone if x.generation < generation]
    known = [x for x in past if x.fitness < NOT_FINITE][-_MOST:]
    one_window = context.settings.window is None
    rows = [(x, float(x.charge), 0 if one_window else x.generation) for x in known]
    numbers = {x.generation for x in known if x.generation}
    met = [(everyone[x.candidate], 1.0, x.generation) for x in context.ledger.anchors()]
    rows += [x for x in met if x[2] in numbers and x[0].fitness < NOT_FINITE]
    return fit(
        loss_curves(context.sensitivity, context.probes),
        [briefing.levels(context, x) for x, _, _ in rows],
        [x.fitness for x, _, _ in rows],
        [share for _, share, _ in rows],
        [window for _, _, window in rows],
        _sampling_error(known),
    )


def _sampling_error(candidates: Sequence[Candidate]) -> float:
    """Return the standard error of a complete plan's fitness beside its generation, a share of it.

    Sequences differ in how hard they are, for all plans alike: what tells plans apart by chance is
    only what is left of the ratios to the generation's mean on each sequence when the mean of each
    plan is taken away as well.
    """
    squares, freedom = 0.0, 0
    complete = [x for x in candidates if x.is_complete]
    for number in dict.fromkeys(x.generation for x in complete):
        rows_NS = np.array([x.values for x in complete if x.generation == number])
        if min(rows_NS.shape) < 2 or (rows_NS <= 0).any():
            continue
        ratios_NS = rows_NS / rows_NS.mean(axis=0)
        squares += float(((ratios_NS - ratios_NS.mean(axis=1, keepdims=True)) ** 2).sum())
        freedom += (rows_NS.shape[0] - 1) * (rows_NS.shape[1] - 1) * rows_NS.shape[1]
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


def fit(
    curves: Curves,
    plans: Sequence[Sequence[tuple[int, int]]],
    fitness: Sequence[float],
    shares: Sequence[float],
    windows: Sequence[int] | None = None,
    error: float = 0.0,
) -> Surrogate:
    """Return the posterior of the scales given scored plans.

    With y the fitness over the mean of its window, less 1, and x the losses less their window's
    mean, over the window's mean total loss: y = x @ scales + noise. It is right where fitness is
    caused by pruning alone, as a divergence is; where it has a large part of its own, such as the
    entropy of text, scales come out too near to each other.

    Args:
        curves: losses by level.
        plans: levels of the plans, may be empty.
        fitness: of each plan, finite.
        shares: of the sequences that each has seen, above 0 to 1.
        windows: on which each was scored; None: all on one.
        error: standard error of a score on a whole window, as a share of the fitness.
    """
    num_blocks = 2 * len(curves)
    model = Surrogate(curves, np.ones(num_blocks), _SPREAD**2 * np.eye(num_blocks))
    if not len(plans):
        return model
    y_N = np.array(fitness, dtype=np.float64)
    variance_N = _MISFIT**2 + error**2 / np.array(shares)
    losses_NB = np.array([_losses(curves, x) for x in plans])
    member_GN = _members([0] * len(plans) if windows is None else windows)
    level_N = _means(member_GN, y_N)
    target_N = (y_N - level_N) / np.where(level_N != 0, np.abs(level_N), 1.0)
    for _ in range(_ROUNDS):
        scale_N = np.maximum(_means(member_GN, losses_NB @ model.scales), 1e-300)
        x_NB = (losses_NB - _means(member_GN, losses_NB)) / scale_N[:, None]
        mean_B, covariance_BB = _posterior(x_NB, target_N, variance_N)
        model = replace(model, mean=mean_B, covariance=covariance_BB)
    total, level = float((losses_NB @ model.scales).mean()), float(y_N.mean())
    unit = abs(level) / total if total > 0 and level else 1.0
    return replace(model, unit=unit, offset=level - unit * total, error=error * abs(level))


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


def _posterior(x_NB: Floats, y_N: Floats, variance_N: Floats) -> tuple[Floats, Floats]:
    """Return mean and covariance of scales that are 1 beforehand, give or take `_SPREAD`."""
    gain_NB = _SPREAD**2 * x_NB
    told_NB = np.linalg.solve(gain_NB @ x_NB.T + np.diag(variance_N), gain_NB)
    covariance_BB = _SPREAD**2 * np.eye(x_NB.shape[1]) - gain_NB.T @ told_NB
    return 1 + told_NB.T @ (y_N - x_NB.sum(axis=1)), covariance_BB


def _losses(curves: Curves, levels: Sequence[tuple[int, int]]) -> Floats:
    """Return the loss of every block (B,) of a plan, layer by layer, attention before MLP."""
    return np.array([pair[b][x[b]] for pair, x in zip(curves, levels, strict=True) for b in (0, 1)])
