"""Slopes against autograd through a model in which one block moves towards another cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.elastic import ElasticModel, run_cut_layer
from pruning.elastic_layer import Recipe
from pruning.families import family_of, run_attention, run_mlp
from pruning.plan import Grid, LayerPlan, Plan
from pruning.slopes import Slopes, stream_slopes


def _ranked(model: Any, tokens: Tensor, unit: str, reconstruction: str) -> tuple[Any, Grid]:
    family, architecture = family_of(model)
    recipe = Recipe("wifv", reconstruction, 0.01, unit)  # type: ignore[arg-type]
    elastic = ElasticModel.rank(model, family, architecture, tokens, recipe)
    return elastic, Grid.of(architecture, 8, unit)  # type: ignore[arg-type]


def _plan(grid: Grid, layers: int) -> Plan:
    """A plan whose layers all differ, dense ones among them."""
    attention, mlp = len(grid.attention), len(grid.mlp)
    return grid.plan([(i % attention, (2 * i + 1) % mlp) for i in range(layers)])


def _target(elastic: ElasticModel, tokens: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    hidden = elastic.family.embed(elastic.model, tokens)
    return torch.randn(hidden.shape, dtype=hidden.dtype, generator=generator)


def _slopes(elastic: ElasticModel, plan: Plan, grid: Grid, tokens: Tensor, batch: int) -> Slopes:
    target = _target(elastic, tokens)

    def gradient(rows: range, hidden: Tensor) -> Tensor:
        return hidden - target[rows.start : rows.stop]

    return stream_slopes(elastic, plan, grid, tokens, gradient, batch_size=batch)


def _derivative(
    elastic: ElasticModel, plan: Plan, tokens: Tensor, moved: tuple[int, int, LayerPlan]
) -> float:
    """The derivative of half the squared distance of the last hidden states from a target.

    In how far the output of one block goes from its own cut towards that of another layer plan.
    """
    by = torch.zeros((), dtype=torch.float64, requires_grad=True)
    hidden = elastic.family.embed(elastic.model, tokens)
    rotary = elastic.family.rotary(elastic.model, hidden)
    runs = (run_attention, lambda layer, x, _: run_mlp(layer, x))
    for i, layer in enumerate(elastic.family.layers(elastic.model)):
        for block, run in enumerate(runs):
            kept = plan.layers[i]
            own = run_cut_layer(layer, kept, elastic.layer_parameters(i, kept), hidden, rotary, run)
            if (i, block) == moved[:2]:
                parameters = elastic.layer_parameters(i, moved[2])
                other = run_cut_layer(layer, moved[2], parameters, hidden, rotary, run)
                own = own + by * (other - own)
            hidden = own
    ((hidden - _target(elastic, tokens)).square().sum() / 2).backward()
    assert by.grad is not None
    return by.grad.item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_slopes_are_derivatives_towards_other_cuts(
    make_model: Any, make_tokens: Any, family: str, unit: str
) -> None:
    model, tokens = make_model(family, dtype=torch.float64), make_tokens(5, 12)
    _compare(*_ranked(model, tokens, unit, "least_squares"), tokens)


@pytest.mark.parametrize("reconstruction", ["none", "bias"])
def test_slopes_know_every_correction(
    make_model: Any, make_tokens: Any, reconstruction: str
) -> None:
    model, tokens = make_model("llama", dtype=torch.float64), make_tokens(5, 12)
    _compare(*_ranked(model, tokens, "kv_group", reconstruction), tokens)


def _compare(elastic: ElasticModel, grid: Grid, tokens: Tensor) -> None:
    plan = _plan(grid, len(elastic.layers))
    slopes = _slopes(elastic, plan, grid, tokens, batch=2)
    for layer, own in enumerate(grid.levels(plan)):
        for block, sizes in enumerate((grid.attention, grid.mlp)):
            assert slopes[layer][block][own[block]] == 0
            for level in range(len(sizes)):
                pair = (level, own[1]) if block == 0 else (own[0], level)
                moved = (layer, block, grid.layer(*pair))
                expected = _derivative(elastic, plan, tokens, moved)
                assert slopes[layer][block][level] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_micro_batches_add_up(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("llama", dtype=torch.float64), make_tokens(6, 12)
    elastic, grid = _ranked(model, tokens, "kv_group", "least_squares")
    plan = _plan(grid, len(elastic.layers))
    whole, parts = (_slopes(elastic, plan, grid, tokens, x) for x in (6, 4))
    for a, b in zip(whole, parts, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, rel=1e-9, abs=1e-9)


def test_gradients_that_are_not_finite_are_refused(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("llama"), make_tokens(2, 8)
    elastic, grid = _ranked(model, tokens, "kv_group", "none")
    plan = _plan(grid, len(elastic.layers))
    with pytest.raises(ValueError, match="not finite; try dtype: float32"):
        stream_slopes(elastic, plan, grid, tokens, lambda _, x: torch.full_like(x, torch.inf))
