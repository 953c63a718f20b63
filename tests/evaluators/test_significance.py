from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evaluators.significance import (
    compare,
    holm,
    mcnemar,
    mean_interval,
    sign_flip,
    stratified_interval,
    t_quantile,
)


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


@pytest.mark.parametrize(("seed", "side"), [(68, 0), (193, 1), (213, 1)])
def test_a_bound_of_zero_is_zero(seed: int, side: int) -> None:
    """Sums over tasks that cancel but for rounding would call a difference resolved."""
    rng = np.random.default_rng(seed)
    dense = {f"t{i}": rng.integers(0, 2, 10).tolist() for i in range(7)}
    pruned = {
        name: [x if rng.random() < 0.8 else int(rng.random() < 0.35) for x in items]
        for name, items in dense.items()
    }
    assert compare(dense, pruned, resamples=400).ci95[side] == 0


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


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),
        ([-0.1] * 5, 2 / 32),
        ([0.1] * 10, 2 / 1024),
        # |sum| >= 2 of the eight sums of 1, 2 and 3 with signs: all but the two zeros.
        ([1.0, -2.0, 3.0], 6 / 8),
        # The sum 6 - 1 = 5 is reached or passed by +-7 and +-5.
        ([1.0, 2.0, -1.0, 3.0], 6 / 16),
        ([0.0, 0.0], 1.0),
    ],
)
def test_sign_flip_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip(differences) == pytest.approx(expected)


def test_sign_flip_is_exact_up_to_its_limit_and_drawn_beyond() -> None:
    assert sign_flip([0.3] * 16) == 2 / 2**16
    assert sign_flip([0.3] * 40, draws=999) == 1 / 1000


def test_drawn_sign_flips_agree_with_the_normal_limit() -> None:
    rng = np.random.default_rng(3)
    values = (rng.normal(size=200) + 0.12).tolist()
    z = abs(sum(values)) / math.sqrt(sum(x * x for x in values))
    assert sign_flip(values, seed=1) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
    assert sign_flip(values, seed=1) == sign_flip(values, seed=1)


def test_sign_flip_has_its_level_under_the_null_hypothesis() -> None:
    rng = np.random.default_rng(0)
    p_values = [sign_flip(rng.normal(size=8).tolist()) for _ in range(400)]
    assert np.mean([p <= 0.05 for p in p_values]) == pytest.approx(12 / 256, abs=0.03)


def test_sign_flip_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        sign_flip([])


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ((0.01, 0.04, 0.03), (0.03, 0.06, 0.06)),
        ((0.02, 0.02, 0.02), (0.06, 0.06, 0.06)),
        ((0.9, 0.001, 0.6), (1.0, 0.003, 1.0)),
    ],
)
def test_holm_on_known_triples(
    p_values: tuple[float, float, float], adjusted: tuple[float, float, float]
) -> None:
    found = holm(dict(zip("abc", p_values, strict=True)))
    assert list(found) == ["a", "b", "c"]
    assert tuple(found.values()) == pytest.approx(adjusted)
    assert holm({}) == {}
    assert holm({"a": 0.2}) == {"a": 0.2}


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)


def test_t_quantile_tends_to_the_normal_one() -> None:
    assert t_quantile(0.975, 100_000) == pytest.approx(1.95996, abs=1e-4)
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)


def test_mean_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, three values: 4.30265 / sqrt(3).
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert mean_interval([1.0]) is None


def test_stratified_intervals_leave_out_what_strata_differ_by() -> None:
    strata = [[1.0, 2.0, 3.0], [101.0, 102.0, 103.0]]
    half = t_quantile(0.975, 4) / 6**0.5  # variance 1 within both
    assert stratified_interval(strata) == pytest.approx((52 - half, 52 + half))
    assert stratified_interval(strata[:1]) == mean_interval(strata[0])
    assert stratified_interval([[1.0], [2.0]]) is None
    half = t_quantile(0.975, 1) * (2 / 3) ** 0.5  # variance 2, of the first alone
    assert stratified_interval([[1.0, 3.0], [5.0]]) == pytest.approx((3 - half, 3 + half))


def test_mean_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(5, 2, size=4).tolist()) for _ in range(600)]
    covered = [x is not None and x[0] <= 5 <= x[1] for x in intervals]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
