"""Corrections against direct solutions from the data itself, not from its moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruning.reconstruction.correction import correction
from pruning.statistics import BlockStatistics, Moments

TOKENS, INPUTS, OUTPUTS = 60, 10, 7
CUTS = (1, 2, 5, 9)
NAMES = ("none", "bias", "least_squares")
Array = NDArray[np.float64]


def _data(seed: int = 0) -> tuple[Array, Array]:
    """Correlated inputs (T, N) with means far from 0, and a weight (O, N)."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(INPUTS, INPUTS))
    x = rng.normal(size=(TOKENS, INPUTS)) @ mixing + 3 * rng.normal(size=INPUTS)
    return x, rng.normal(size=(OUTPUTS, INPUTS))


def _statistics(x: Array, dtype: torch.dtype = torch.float64) -> BlockStatistics:
    mean, square = torch.tensor(x.mean(0)), torch.tensor((x * x).mean(0))
    gram = torch.tensor(sum(np.outer(row, row) for row in x) / len(x)).to(dtype)
    return BlockStatistics(len(x), mean, square, gram, 1.0)


def _ridge(x: Array, ridge: float) -> float:
    return ridge * float(np.mean(x.var(0)))


def _direct(x: Array, weight: Array, kept: int, damping: float) -> tuple[Array, Array]:
    """argmin over W_k of E|W_k x_k - W x|^2 + damping |W_k - W_:,k|^2 on centred inputs.

    An ordinary least-squares problem once sqrt(damping) I is stacked below the data.
    """
    centred = x - x.mean(0)
    scale = math.sqrt(len(x))
    rows = np.vstack([centred[:, :kept] / scale, math.sqrt(damping) * np.eye(kept)])
    goal = np.vstack([centred @ weight.T / scale, math.sqrt(damping) * weight[:, :kept].T])
    solution = np.linalg.lstsq(rows, goal, rcond=None)[0].T
    return solution, weight @ x.mean(0) - solution @ x.mean(0)[:kept]


def _output_error(x: Array, weight: Array, kept: int, small: Array, bias: Array | float) -> float:
    """E|W x - (W_k x_k + b)|^2, token by token."""
    errors = [float(((weight @ row - small @ row[:kept] - bias) ** 2).sum()) for row in x]
    return sum(errors) / len(errors)


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().numpy()


@pytest.mark.parametrize("kept", CUTS)
def test_none_keeps_the_columns(kept: int) -> None:
    x, weight = _data()
    found, bias = correction("none", torch.tensor(weight), _statistics(x), 0.01).cut(kept)
    assert bias is None
    assert np.array_equal(_numpy(found), weight[:, :kept])


@pytest.mark.parametrize("kept", CUTS)
def test_bias_is_the_mean_of_what_is_gone(kept: int) -> None:
    x, weight = _data()
    found, bias = correction("bias", torch.tensor(weight), _statistics(x), 0.01).cut(kept)
    assert np.array_equal(_numpy(found), weight[:, :kept])
    assert bias is not None
    lost = np.mean([weight[:, kept:] @ row[kept:] for row in x], axis=0)
    assert np.allclose(_numpy(bias), lost, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("kept", CUTS)
def test_least_squares_is_the_direct_solution(kept: int, ridge: float) -> None:
    x, weight = _data()
    made = correction("least_squares", torch.tensor(weight), _statistics(x), ridge)
    found, bias = made.cut(kept)
    assert bias is not None
    expected, expected_bias = _direct(x, weight, kept, _ridge(x, ridge))
    assert np.allclose(_numpy(found), expected, rtol=1e-8, atol=1e-8)
    assert np.allclose(_numpy(bias), expected_bias, rtol=1e-8, atol=1e-8)


def test_single_precision_is_good_enough() -> None:
    x, weight = _data()
    weight_ON = torch.tensor(weight).float()
    made = correction("least_squares", weight_ON, _statistics(x, torch.float32), 0.01)
    for kept in CUTS:
        found, _ = made.cut(kept)
        expected, _ = _direct(x, weight, kept, _ridge(x, 0.01))
        assert found.dtype == torch.float32
        assert np.allclose(_numpy(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_measured", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_the_expected_output_errors(name: str, is_measured: bool) -> None:
    """Every cut, the empty one and the full one included, in any order."""
    x, weight = _data()
    ridge = 0.05
    root = np.random.default_rng(5).normal(size=(3, OUTPUTS)) if is_measured else np.eye(OUTPUTS)
    made = correction(name, torch.tensor(weight), _statistics(x), ridge)
    cuts = [4, *range(INPUTS, -1, -1), 4]
    errors = made.errors(cuts, torch.tensor(root) if is_measured else None)
    assert errors.dtype == torch.float64
    for kept, error in zip(cuts, errors.tolist(), strict=True):
        small, bias = weight[:, :kept], np.zeros(OUTPUTS)
        if name == "bias":
            bias = weight[:, kept:] @ x.mean(0)[kept:]
        if name == "least_squares":
            small, bias = _direct(x, weight, kept, _ridge(x, ridge))
        expected = _output_error(x, root @ weight, kept, root @ small, root @ bias)
        assert error == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_cutting_nothing_is_the_identity(name: str) -> None:
    x, weight = _data()
    made = correction(name, torch.tensor(weight), _statistics(x), 0.5)
    found, bias = made.cut(INPUTS)
    assert np.array_equal(_numpy(found), weight)
    assert bias is None or not bias.any()
    assert float(made.errors([INPUTS])[0]) == 0


def test_constant_channels_cost_nothing_with_a_bias() -> None:
    x, weight = _data()
    x[:, -1] = 5.0
    found = correction("bias", torch.tensor(weight), _statistics(x), 0.01)
    assert float(found.errors([INPUTS - 1])[0]) == pytest.approx(0, abs=1e-12)
    _, bias = found.cut(INPUTS - 1)
    assert bias is not None
    assert np.allclose(_numpy(bias), 5.0 * weight[:, -1])
    without = correction("none", torch.tensor(weight), _statistics(x), 0.01)
    assert float(without.errors([INPUTS - 1])[0]) == pytest.approx(
        25.0 * float((weight[:, -1] ** 2).sum())
    )


def test_one_channel_costs_its_variance_with_a_bias() -> None:
    """FLAP's closed form: var(x_j) |W_:,j|^2 for the last channel alone."""
    x, weight = _data()
    errors = correction("bias", torch.tensor(weight), _statistics(x), 0.01).errors([INPUTS - 1])
    expected = x[:, -1].var() * (weight[:, -1] ** 2).sum()
    assert float(errors[0]) == pytest.approx(float(expected), rel=1e-9)


def test_dependent_channels_are_reproduced_without_ridge() -> None:
    """The last three inputs are combinations of the kept ones: the output must not change."""
    x, weight = _data()
    combinations = np.random.default_rng(1).normal(size=(7, 3))
    x[:, 7:] = x[:, :7] @ combinations + 2.0
    expected = x @ weight.T
    previous = math.inf
    for ridge in (1e-2, 1e-5, 1e-8):
        made = correction("least_squares", torch.tensor(weight), _statistics(x), ridge)
        found, bias = made.cut(7)
        assert bias is not None
        error = float(np.abs(x[:, :7] @ _numpy(found).T + _numpy(bias) - expected).max())
        assert error < previous
        previous = error
    assert previous < 1e-5 * float(np.abs(expected).max())


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_never_gets_worse_with_more_channels(seed: int) -> None:
    x, weight = _data(seed)
    made = correction("least_squares", torch.tensor(weight), _statistics(x), 1e-9)
    errors = made.errors(range(INPUTS + 1))
    assert bool((errors.diff() <= 1e-12).all())
    assert float(errors[0]) > float(errors[-2]) > 0


@pytest.mark.parametrize("kept", CUTS)
def test_corrections_are_ordered(kept: int) -> None:
    """More freedom, less output error: none >= bias >= least squares with a small ridge."""
    x, weight = _data()
    found = []
    for name in NAMES:
        small, bias = correction(name, torch.tensor(weight), _statistics(x), 1e-6).cut(kept)
        found.append(
            _output_error(x, weight, kept, _numpy(small), 0.0 if bias is None else _numpy(bias))
        )
    assert found[0] > found[1] > found[2]


def test_silent_inputs_do_not_break_the_factor() -> None:
    """No activation at all, as behind a dead block: the weights stay as they are."""
    weight = _data()[1]
    statistics = _statistics(np.zeros((TOKENS, INPUTS)))
    found, bias = correction("least_squares", torch.tensor(weight), statistics, 0.01).cut(4)
    assert bias is not None
    assert np.allclose(_numpy(found), weight[:, :4])
    assert not bias.any()


def test_a_large_constant_channel_does_not_break_the_factor() -> None:
    """Single precision, as in a real run: a mean of 300 spreads, then float32 moments of it."""
    generator = torch.Generator().manual_seed(0)
    moments = Moments()
    for _ in range(4):
        x_BTN = torch.randn(8, 128, INPUTS, generator=generator)
        x_BTN[..., 3] = 300.0
        moments.add(x_BTN)
        moments.add_residual(x_BTN)
    weight_ON = torch.randn(OUTPUTS, INPUTS, generator=generator)
    found, bias = correction("least_squares", weight_ON, moments.finish(), 0.01).cut(5)
    assert bias is not None
    assert bool(found.isfinite().all())


def test_unknown_correction_names_the_known() -> None:
    x, weight = _data()
    message = "^pruning.reconstruction: got 'obs', allowed none, bias, least_squares$"
    with pytest.raises(ValueError, match=message):
        correction("obs", torch.tensor(weight), _statistics(x), 0.01)


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize("cuts", [(0, 1, 2, 5, 9, 10), (9, 0, 5, 5, 10), (3,), (10,), ()])
def test_errors_are_those_of_each_cut_alone(
    monkeypatch: pytest.MonkeyPatch, rows: int, cuts: tuple[int, ...]
) -> None:
    x, weight = _data()
    found = correction("least_squares", torch.tensor(weight), _statistics(x), 0.1)
    monkeypatch.setattr("pruning.reconstruction.correction._ROWS", rows)
    alone = [found.errors([cut]).item() for cut in cuts]
    assert found.errors(cuts).tolist() == pytest.approx(alone, rel=1e-12)
