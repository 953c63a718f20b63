from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evaluators.significance import compare, mcnemar


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (7, 1, 2 * 9 / 256), (4, 4, 1.0)],
)
def test_mcnemar_by_hand(lost: int, gained: int, expected: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_mcnemar_survives_many_items() -> None:
    # Normal approximation with continuity correction: z = (200 - 1) / sqrt(5000).
    z = 199 / math.sqrt(5000)
    assert mcnemar(2600, 2400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_points_are_the_unweighted_mean_over_tasks() -> None:
    difference = compare(
        {"small": [1, 1], "large": [0] * 8}, {"small": [1, 0], "large": [1] + [0] * 7}
    )
    assert difference.points == pytest.approx(100 * (-1 / 2 + 1 / 8) / 2)
    assert difference.mcnemar == {"small": 1.0, "large": 1.0}


def test_equal_models_have_no_interval() -> None:
    difference = compare({"a": [1, 0, 1]}, {"a": [1, 0, 1]})
    assert (difference.points, difference.ci95) == (0.0, (0.0, 0.0))


def test_interval_is_that_of_every_possible_resample() -> None:
    """Two tasks of three items: all 27 x 27 resamples can be written down."""
    dense, pruned = {"a": [1, 1, 0], "b": [0, 1, 1]}, {"a": [0, 1, 1], "b": [0, 0, 0]}
    steps = [np.subtract(pruned[task], dense[task]) for task in ("a", "b")]
    means = [
        [np.mean(draw) for draw in itertools.product(step, repeat=len(step))] for step in steps
    ]
    exact = [50 * (a + b) for a, b in itertools.product(*means)]
    difference = compare(dense, pruned, seed=1)
    assert difference.ci95 == pytest.approx(np.percentile(exact, [2.5, 97.5]), abs=1e-9)


def test_interval_has_the_width_of_the_paired_standard_error() -> None:
    rng = np.random.default_rng(0)
    dense = {"a": rng.integers(0, 2, 1000).tolist(), "b": rng.integers(0, 2, 400).tolist()}
    pruned = {task: [v if rng.random() < 0.8 else 1 - v for v in dense[task]] for task in dense}
    variance = sum(np.var(np.subtract(pruned[t], dense[t])) / len(dense[t]) for t in dense) / 4
    low, high = compare(dense, pruned, seed=2).ci95
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(variance), rel=0.05)


def test_seed_fixes_the_interval() -> None:
    dense, pruned = {"a": [1, 0, 1, 1, 0]}, {"a": [0, 0, 1, 0, 1]}
    assert compare(dense, pruned, seed=5) == compare(dense, pruned, seed=5)


@pytest.mark.parametrize(
    ("dense", "pruned", "message"),
    [
        ({"a": [1]}, {"b": [1]}, "missing"),
        ({"a": [1, 0]}, {"a": [1]}, "2 dense and 1 pruned"),
        ({"a": []}, {"a": []}, "at least one"),
        ({}, {}, "no task"),
    ],
)
def test_unpaired_items_are_refused(
    dense: dict[str, list[int]], pruned: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(dense, pruned)
