"""The equalities of the surgeon on real weights: masked, elastic and sliced are one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.families import family_of
from pruning.loading import load
from pruning.plan import Grid, Plan
from pruning.ranking import head_rows
from pruning.slicing import sliced

pytestmark = pytest.mark.real

TOKENS = torch.arange(100, 100 + 2 * 48).view(2, 48)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """Return the packaged model in float64."""
    model, _ = load("smollm2-135m-instruct", torch.float64)
    return model


def ranked(model: nn.Module, reconstruction: str) -> tuple[ElasticModel, Plan]:
    family, architecture = family_of(model)
    tokens = torch.randint(0, 49_152, (4, 64), generator=torch.Generator().manual_seed(0))
    elastic = ElasticModel.rank(
        model, family, architecture, tokens, Recipe("wifv", reconstruction, 0.1)
    )
    grid, rng = Grid.of(architecture, 32), np.random.default_rng(0)
    sizes = (len(grid.attention), len(grid.mlp))
    return elastic, grid.plan([tuple(rng.integers(sizes).tolist()) for _ in elastic.layers])


def masked_logits(model: nn.Module, elastic: ElasticModel, plan: Plan) -> Tensor:
    """Return the dense model's logits with the columns of removed units set to zero."""
    layers = family_of(model)[0].layers(model)
    kept_weights = []
    for layer, ranks, kept in zip(layers, elastic.layers, plan.layers, strict=True):
        output, down = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
        kept_weights.append((output.detach().clone(), down.detach().clone()))
        gone = ranks.order.heads[kept.kv_groups :].flatten()
        output.data[:, head_rows(gone, 64)] = 0
        down.data[:, ranks.order.channels[kept.mlp_channels :]] = 0
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    for layer, (output, down) in zip(layers, kept_weights, strict=True):
        layer.self_attn.o_proj.weight.data.copy_(output)
        layer.mlp.down_proj.weight.data.copy_(down)
    return logits


@torch.no_grad()
def test_masked_is_sliced_in_float64(dense: nn.Module) -> None:
    elastic, plan = ranked(dense, "none")
    difference = masked_logits(dense, elastic, plan) - sliced(elastic, plan)(TOKENS).logits
    assert difference.abs().max() < 1e-9


@torch.no_grad()
def test_elastic_is_sliced_in_float32(dense: nn.Module) -> None:
    model = dense.float()
    elastic, plan = ranked(model, "least_squares")
    expected = sliced(elastic, plan)(TOKENS).logits
    ((_, hidden),) = elastic.hidden_states([plan], TOKENS)
    logits = hidden @ elastic.family.head(model).T
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_together_are_plans_alone(dense: nn.Module, dtype: torch.dtype) -> None:
    elastic, plan = ranked(dense.to(dtype), "least_squares")
    full = Plan.dense(family_of(dense)[1])
    plans = [Plan((*plan.layers[:n], *full.layers[n:])) for n in (30, 20, 20, 7, 0)]
    for index, together in elastic.hidden_states(plans, TOKENS):
        ((_, alone),) = elastic.hidden_states([plans[index]], TOKENS)
        assert torch.equal(together, alone)
