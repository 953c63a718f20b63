"""Is one worse than the other, or is it noise? Paired tests on the same items or runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_DIGITS = 9  # of a bound in percentage points
EXACT_UNITS = 16  # 65,536 sign patterns: all of them are tried


@dataclass(frozen=True)
class Difference:
    """Pruned minus dense accuracy on the same items.

    Attributes:
        points: Difference of the unweighted means over tasks, in percentage points.
        ci95: Its 95 % paired bootstrap interval (low, high), resampled within each task.
        mcnemar: Exact two-sided McNemar p value per task.
    """

    points: float
    ci95: tuple[float, float]
    mcnemar: dict[str, float]


def compare(
    dense: Mapping[str, Sequence[int]],
    pruned: Mapping[str, Sequence[int]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Paired comparison of two models.

    Args:
        dense: Per task, 1 or 0 per item for right or wrong.
        pruned: The same tasks and items, in the same order.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples.

    Raises:
        ValueError: If tasks or numbers of items differ.
    """
    steps = {task: _paired(task, dense, pruned) for task in sorted({*dense, *pruned})}
    if not steps:
        raise ValueError("compare: got no task, need at least one")
    means = _bootstrap_means(list(steps.values()), np.random.default_rng(seed), resamples)
    # Gains and losses that cancel leave rounding, which is no side of zero.
    low, high = np.percentile(100 * means, [2.5, 97.5]).round(_DIGITS) + 0.0
    return Difference(
        points=100 * float(np.mean([step.mean() for step in steps.values()])),
        ci95=(float(low), float(high)),
        mcnemar={task: _mcnemar_of(step) for task, step in steps.items()},
    )


def mcnemar(only_dense: int, only_pruned: int) -> float:
    """Exact two-sided McNemar p value from the numbers of items only one model gets right.

    Under the null hypothesis the smaller one is Binomial(n, 1/2), n their sum; p = 1 for n = 0.
    """
    total = only_dense + only_pruned
    tail = sum(math.comb(total, k) for k in range(min(only_dense, only_pruned) + 1))
    # Integers divide without overflow however large the numbers of items are.
    return min(1.0, 2 * tail / (1 << total))


def sign_flip(differences: Sequence[float], seed: int = 0, draws: int = 2 * RESAMPLES) -> float:
    """Two-sided p value that the mean of paired differences is zero.

    Under the null hypothesis each difference is as likely with the other sign (Fisher, The Design
    of Experiments, 1935, section 21): p is the share of sign patterns whose mean is as far from
    zero as the observed one. All patterns are tried up to `EXACT_UNITS` units, which gives at
    least 2 / 2**n; beyond, `draws` random ones and the observed one itself (Phipson and Smyth,
    2010), so that p is never zero.

    Args:
        differences: One number a unit, such as one search minus another at the same seed.
        seed: Seed of the drawn patterns.
        draws: How many of them.

    Raises:
        ValueError: If there is no unit.
    """
    values = np.asarray(differences, np.float64)
    if not values.size:
        raise ValueError("sign_flip: got no difference, need at least one")
    is_exact = values.size <= EXACT_UNITS
    if is_exact:
        patterns = np.arange(1 << values.size)[:, None] >> np.arange(values.size) & 1
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, (draws, values.size), np.int8)
    sums = np.abs((1.0 - 2.0 * patterns) @ values)
    # Equal sums differ by rounding when they are added up in another order.
    extreme = int((sums >= abs(values.sum()) - 1e-12 * np.abs(values).sum()).sum())
    return extreme / len(sums) if is_exact else (extreme + 1) / (len(sums) + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of a family of tests, by name: the chance of any false alarm stays below.

    The k-th smallest of m is multiplied by m - k + 1, made monotone and cut at 1 (Holm, A simple
    sequentially rejective multiple test procedure, 1979); no independence is assumed.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda x: (p_values[x], x))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval (low, high) of a mean; None for fewer than two values."""
    return stratified_interval([values], level)


def stratified_interval(
    strata: Sequence[Sequence[float]], level: float = 0.95
) -> tuple[float, float] | None:
    """Student's t interval (low, high) of the mean of all values, by what varies within strata.

    Strata are what was chosen, such as budgets: how far they lie apart says nothing about another
    draw. The variance is pooled, its degrees of freedom are values less strata; None for none.
    """
    values = np.concatenate([np.asarray(x, np.float64) for x in strata])
    freedom = len(values) - len(strata)
    if freedom < 1:
        return None
    squares = sum(float(((np.asarray(x) - np.mean(x)) ** 2).sum()) for x in strata)
    half = t_quantile((1 + level) / 2, freedom) * (squares / freedom / len(values)) ** 0.5
    mean = float(values.mean())
    return mean - half, mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution for 0.5 <= `probability` < 1, by bisection."""
    low, high = 0.0, math.pi / 2
    while high - low > 1e-14:
        middle = (low + high) / 2
        below = (1 + _t_central(middle, freedom)) / 2
        low, high = (middle, high) if below < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_central(angle: float, freedom: int) -> float:
    """P(|T| <= t) for t = sqrt(freedom) tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    is_odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def _paired(
    task: str, dense: Mapping[str, Sequence[int]], pruned: Mapping[str, Sequence[int]]
) -> NDArray[np.int64]:
    """Per item +1 gained, 0 same, -1 lost."""
    if task not in dense or task not in pruned:
        raise ValueError(f"compare: task {task} is missing for one of the two models")
    before, after = np.asarray(dense[task], np.int64), np.asarray(pruned[task], np.int64)
    if before.shape != after.shape or before.size == 0:
        raise ValueError(
            f"compare: task {task} has {before.size} dense and {after.size} pruned items, "
            "need equally many, at least one"
        )
    return after - before


def _bootstrap_means(
    steps: list[NDArray[np.int64]], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """Unweighted task means of resampled differences, shape (resamples,).

    Items take one of three values, so drawing n of n with replacement is one multinomial draw of
    their counts: exact, and as cheap for ten thousand items as for forty.
    """
    total = np.zeros(resamples)
    for step in steps:
        shares = np.array([(step == value).mean() for value in (-1, 0, 1)])
        counts = rng.multinomial(step.size, shares, size=resamples)
        total += (counts[:, 2] - counts[:, 0]) / step.size
    return total / len(steps)


def _mcnemar_of(step: NDArray[np.int64]) -> float:
    return mcnemar(only_dense=int((step < 0).sum()), only_pruned=int((step > 0).sum()))
