"""OBS against brute force: every removal tried, the survivors refitted from scratch, in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pruning.metrics.obs import obs
from pruning.metrics.wifv import wifv
from pruning.statistics import BlockStatistics
from pruning.units import Units

Array = NDArray[np.float64]
RIDGE = 0.05
LAYOUTS = [Units(1, 12, 1), Units(1, 4, 3), Units(2, 3, 2), Units(4, 3, 1), Units(1, 1, 12)]


def _data(seed: int, inputs: int = 12, outputs: int = 5) -> tuple[Array, Array]:
    """Strongly correlated inputs (T, N) with means far from 0, and a weight (O, N)."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(200, inputs // 2)) @ rng.normal(size=(inputs // 2, inputs))
    scales = np.exp(rng.normal(size=inputs))
    x = (factors + 0.3 * rng.normal(size=(200, inputs))) * scales + 3 * rng.normal(size=inputs)
    return x, rng.normal(size=(outputs, inputs))


def _statistics(x: Array) -> BlockStatistics:
    rows = torch.tensor(x)
    return BlockStatistics(len(x), rows.mean(0), rows.square().mean(0), rows.T @ rows / len(x), 1.0)


def _moments(x: Array, ridge: float) -> Array:
    covariance = np.cov(x.T, bias=True)
    return covariance + ridge * np.mean(np.diag(covariance)) * np.eye(len(covariance))


def _loss(moments: Array, weight: Array, kept: list[int]) -> float:
    """The least damped error with only `kept` channels, from the normal equations."""
    small = np.linalg.solve(moments[np.ix_(kept, kept)], moments[kept] @ weight.T).T
    difference = weight.copy()
    difference[:, kept] -= small
    return float(np.trace(difference @ moments @ difference.T))


def _channels(units: Units, kept: set[int]) -> list[int]:
    return [u * units.channels + c for u in sorted(kept) for c in range(units.channels)]


def _greedy(moments: Array, weight: Array, units: Units) -> list[int]:
    """The step of each unit: one of every set, each the cheapest while the others stay."""
    kept, steps = set(range(units.sets * units.per_set)), [0] * (units.sets * units.per_set)
    for step in range(units.per_set):
        going = [
            min(
                (u for u in sorted(kept) if u // units.per_set == group),
                key=lambda u: _loss(moments, weight, _channels(units, kept - {u})),
            )
            for group in range(units.sets)
        ]
        for unit in going:
            steps[unit] = step
        kept -= set(going)
    return steps


def _steps(x: Array, weight: Array, units: Units, batch: int = 1) -> Array:
    scores = obs(torch.tensor(weight), _statistics(x), units, RIDGE, batch)
    assert scores.dtype == torch.float64
    assert scores.shape == (weight.shape[1],)
    return scores.numpy().reshape(-1, units.channels)


@pytest.mark.parametrize(("units", "seed"), list(product(LAYOUTS, range(4))))
def test_single_removals_are_the_exact_greedy_order(units: Units, seed: int) -> None:
    x, weight = _data(seed)
    found = _steps(x, weight, units)
    assert np.allclose(found, found[:, :1]), "channels of a unit share its step"
    expected = _greedy(_moments(x, RIDGE), weight, units)
    assert np.allclose(found.sum(1), expected)


def _summed_error(x: Array, weight: Array, scores: Array) -> float:
    """The error of the best survivors, summed over all cuts of an order of single channels."""
    moments, order = _moments(x, RIDGE), np.argsort(-scores, kind="stable").tolist()
    return sum(_loss(moments, weight, order[:kept]) for kept in range(1, len(order)))


@pytest.mark.parametrize("seed", range(12))
def test_never_worse_than_wifv_when_survivors_make_up(seed: int) -> None:
    x, weight = _data(seed, inputs=16)
    found = _steps(x, weight, Units(1, 16, 1)).ravel()
    rival = wifv(torch.tensor(weight), _statistics(x)).numpy()
    assert _summed_error(x, weight, found) <= _summed_error(x, weight, rival)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_batches_come_close(seed: int, batch: int) -> None:
    """Twenty-four channels of rank twelve: an order in batches loses at most a tenth."""
    x, weight = _data(seed, inputs=24)
    one, many = (_steps(x, weight, Units(1, 24, 1), size).ravel() for size in (1, batch))
    assert sorted(many) == list(range(24))
    assert _summed_error(x, weight, many) <= 1.1 * _summed_error(x, weight, one)


def test_a_batch_takes_whole_units() -> None:
    """Eight channels are two units of three, and at least one unit goes."""
    x, weight = _data(0)
    for batch, units in ((8, Units(1, 4, 3)), (2, Units(1, 4, 3)), (8, Units(2, 3, 2))):
        steps = _steps(x, weight, units, batch).sum(1).reshape(units.sets, units.per_set)
        assert np.allclose(np.sort(steps, axis=1), np.arange(units.per_set))


def test_of_two_copies_one_goes_first_and_the_other_stays() -> None:
    """Either alone is free to lose, both are not: what no channel metric sees."""
    x, weight = _data(3)
    x[:, 1] = x[:, 0] = 20 * np.random.default_rng(0).normal(size=len(x))
    weight[:, 1] = weight[:, 0] = 1.0
    steps = obs(torch.tensor(weight), _statistics(x), Units(1, 12, 1), 1e-6, 1)[:2].tolist()
    assert min(steps) == 0
    assert max(steps) >= 10
    ranks = wifv(torch.tensor(weight), _statistics(x)).argsort().argsort()[:2]
    assert min(ranks.tolist()) >= 10


def test_independent_channels_go_by_their_energy() -> None:
    """With a diagonal covariance nothing can be made up: the cost is (var_j + lambda) |W_j|^2."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 8))
    x = np.linalg.qr(noise - noise.mean(0))[0] * 20 * np.arange(1, 9) + 5.0
    weight = rng.normal(size=(5, 8))
    damped = x.var(0) + RIDGE * np.mean(x.var(0))
    expected = (damped * (weight**2).sum(0)).argsort().argsort()
    assert _steps(x, weight, Units(1, 8, 1)).ravel().tolist() == expected.tolist()


def test_moments_that_are_not_finite_are_refused() -> None:
    x, weight = _data(0)
    x[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"^calibration: the activations are not finite"):
        _steps(x, weight, Units(1, 12, 1))
