"""Is the pruned model worse, or is it noise? Paired tests on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


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
    low, high = np.percentile(100 * means, [2.5, 97.5])
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
