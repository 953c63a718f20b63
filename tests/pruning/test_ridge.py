"""The chosen ridge against fits and held-out errors from the tokens themselves, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.families import family_of
from pruning.output_projection import OutputProjection
from pruning.plan import LayerPlan
from pruning.reconstruction.ridge import RIDGES, UNDECIDED, held_out_ridge, output_error
from pruning.statistics import BlockStatistics, Moments
from pruning.units import Units

Array = NDArray[np.float64]


def _data(tokens: int, seed: int) -> tuple[Array, Array]:
    """Few factors and much noise, so that few tokens overfit; a weight (5, 12)."""
    rng = np.random.default_rng(7)
    mixing, weight = rng.normal(size=(3, 12)), rng.normal(size=(5, 12))
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(tokens, 3)) @ mixing
    return factors + 0.7 * rng.normal(size=(tokens, 12)) + 2.0, weight


def _statistics(x: Array, held_out: BlockStatistics | None = None) -> BlockStatistics:
    rows = torch.tensor(x)
    gram = rows.T @ rows / len(x)
    return BlockStatistics(len(x), rows.mean(0), rows.square().mean(0), gram, 1.0, held_out)


def _projection(fit: Array, held_out: Array, weight: Array, units: Units) -> OutputProjection:
    both = _statistics(np.vstack([fit, held_out]), _statistics(held_out))
    return OutputProjection(torch.tensor(weight), both, units)


def _order(x: Array, weight: Array, units: Units) -> list[int]:
    """Channels by the fluctuation of their units; rank by rank over the sets."""
    scores = x.var(0) * (weight**2).sum(0)
    scores = scores.reshape(units.sets, units.per_set, units.channels).sum(-1)
    order = np.argsort(-scores, axis=1)
    return [
        (group * units.per_set + order[group, rank]) * units.channels + channel
        for rank in range(units.per_set)
        for group in range(units.sets)
        for channel in range(units.channels)
    ]


def _held_out_error(fit: Array, held: Array, weight: Array, kept: list[int], ridge: float) -> float:
    """Ridge towards the old columns as extra rows of an ordinary least-squares problem."""
    centred = fit - fit.mean(0)
    damping = np.sqrt(ridge * np.mean(fit.var(0)) * len(fit))
    rows = np.vstack([centred[:, kept], damping * np.eye(len(kept))])
    goal = np.vstack([centred @ weight.T, damping * weight[:, kept].T])
    small = np.linalg.lstsq(rows, goal, rcond=None)[0].T
    bias = weight @ fit.mean(0) - small @ fit.mean(0)[kept]
    errors = held @ weight.T - held[:, kept] @ small.T - bias
    return float((errors**2).sum(1).mean())


@pytest.mark.parametrize("tokens", [14, 40, 2000])
@pytest.mark.parametrize(
    ("units", "cuts"),
    [
        (Units(1, 12, 1), (4, 8)),
        (Units(1, 3, 4), (4, 8)),
        (Units(2, 3, 2), (4, 8)),
        (Units(1, 2, 6), (6,)),
    ],
)
def test_the_ridge_does_best_on_held_out_tokens(
    tokens: int, units: Units, cuts: tuple[int, ...]
) -> None:
    (fit, weight), (held, _) = _data(tokens, 1), _data(60, 2)
    order = _order(np.vstack([fit, held]), weight, units)
    errors = [
        sum(_held_out_error(fit, held, weight, order[:kept], ridge) for kept in cuts)
        for ridge in RIDGES
    ]
    found = held_out_ridge(_projection(fit, held, weight, units))
    assert found == RIDGES[int(np.argmin(errors))]


def test_fewer_tokens_ask_for_a_stiffer_ridge() -> None:
    held, weight = _data(500, 2)
    few, many = (
        held_out_ridge(_projection(_data(tokens, 1)[0], held, weight, Units(1, 12, 1)))
        for tokens in (14, 4000)
    )
    assert few > many


@pytest.mark.parametrize("units", [Units(1, 1, 12), Units(12, 1, 1)])
def test_nothing_to_cut_leaves_it_undecided(units: Units) -> None:
    (fit, weight), (held, _) = _data(40, 1), _data(60, 2)
    assert held_out_ridge(_projection(fit, held, weight, units)) == UNDECIDED


def test_nothing_held_out_leaves_it_undecided() -> None:
    x, weight = _data(40, 1)
    projection = OutputProjection(torch.tensor(weight), _statistics(x), Units(1, 12, 1))
    assert held_out_ridge(projection) == UNDECIDED


def test_output_error_is_explicit() -> None:
    x, weight = _data(40, 1)
    small, bias = weight[:, :7] + 0.1, np.arange(5.0)
    expected = ((x @ weight.T - x[:, :7] @ small.T - bias) ** 2).sum(1).mean()
    found = output_error(
        torch.tensor(weight), torch.tensor(small), torch.tensor(bias), _statistics(x)
    )
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_fit_is_what_is_not_held_out() -> None:
    (fit, _), (held, _) = _data(40, 1), _data(60, 2)
    found = _statistics(np.vstack([fit, held]), _statistics(held)).fit
    expected = _statistics(fit)
    assert (found.count, found.held_out) == (40, None)
    for name in ("mean", "square", "gram", "variance"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)
    assert expected.fit is expected


def test_merged_moments_are_those_of_all_tokens() -> None:
    x, _ = _data(40, 1)
    parts, whole = (Moments(), Moments()), Moments()
    for rows, into in ((x[:10], parts[0]), (x[10:], parts[1]), (x, whole)):
        batch_BTN = torch.tensor(rows).unsqueeze(0)
        into.add(batch_BTN)
        into.add_residual(batch_BTN)
    found, expected = parts[0].merged(parts[1]).finish(), whole.finish()
    assert found.count == expected.count == 40
    assert found.residual_energy == expected.residual_energy
    for name in ("mean", "square", "gram"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    assert parts[0].finish().count == 10


def _ranked(model: Any, tokens: torch.Tensor, recipe: Recipe, batch_size: int = 2) -> ElasticModel:
    family, architecture = family_of(model)
    return ElasticModel.rank(model, family, architecture, tokens, recipe, batch_size=batch_size)


def test_the_correction_takes_the_chosen_ridge_and_all_tokens(
    make_model: Any, make_tokens: Any
) -> None:
    """Held-out tokens choose, then take part: the model is that of the fixed ridge."""
    model, tokens = make_model("llama", num_hidden_layers=1), make_tokens(24, 16)
    (chosen,) = _ranked(model, tokens, Recipe("wifv", "least_squares", "auto")).layers
    assert set(chosen.ridges) <= set(RIDGES)
    kept = LayerPlan(2, 2, 16)
    for role, ridge in zip(("attention", "mlp"), chosen.ridges, strict=True):
        (fixed,) = _ranked(model, tokens, Recipe("wifv", "least_squares", ridge)).layers
        found, expected = (getattr(x, f"{role}_output")(kept) for x in (chosen, fixed))
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-9)


def test_one_batch_has_nothing_to_hold_out(make_model: Any, make_tokens: Any) -> None:
    elastic = _ranked(
        make_model("llama"), make_tokens(4, 16), Recipe("wifv", "least_squares", "auto"), 8
    )
    assert [layer.ridges for layer in elastic.layers] == [(UNDECIDED, UNDECIDED)] * 3


@pytest.mark.parametrize(
    ("metric", "reconstruction", "holds_out"),
    [
        ("wifv", "least_squares", True),
        ("obs", "bias", True),
        ("wifv", "bias", False),
        ("wanda_sp", "none", False),
    ],
)
def test_tokens_are_held_out_where_a_ridge_is_used(
    metric: str, reconstruction: str, holds_out: bool
) -> None:
    assert Recipe(metric, reconstruction, "auto").holds_out == holds_out
    assert not Recipe(metric, reconstruction, 0.1).holds_out
