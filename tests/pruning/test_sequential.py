"""Sequential pruning: every layer is ranked on what the pruned layers before it put out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.elastic import Recipe
from pruning.families import family_of
from pruning.plan import Plan
from pruning.sequential import SequentialModel
from pruning.slicing import sliced

PLAN = Plan.from_json([[1, 2, 16], [2, 2, 24]])


def _sequential(model: Any, tokens: Tensor, reconstruction: str = "none") -> SequentialModel:
    family, architecture = family_of(model)
    recipe = Recipe("wanda_sp", reconstruction, 0.01)
    return SequentialModel(model, family, architecture, tokens, recipe, batch_size=4)


def _scores(layer: Any, seen: Any) -> tuple[list[float], list[float]]:
    """Wanda-sp of the 4 KV groups (2 heads of 8 each) and of the 48 channels."""
    output, down = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
    heads = output.abs().mean(0) * seen.rows("attention").square().mean(0).sqrt()
    channels = down.abs().mean(0) * seen.rows("mlp").square().mean(0).sqrt()
    return [float(heads[g * 16 : (g + 1) * 16].sum()) for g in range(4)], channels.tolist()


def _falling(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda unit: -scores[unit])


def _silenced(model: Any, groups: list[int], channels: list[int]) -> Any:
    """The dense model with all other groups and channels of layer 0 silent."""
    masked = copy.deepcopy(model)
    layer = masked.model.layers[0]
    kept = [g * 16 + i for g in groups for i in range(16)]
    for linear, columns in ((layer.self_attn.o_proj, kept), (layer.mlp.down_proj, channels)):
        weight = torch.zeros_like(linear.weight)
        weight[:, columns] = linear.weight[:, columns]
        linear.weight = torch.nn.Parameter(weight)
    return masked


def test_statistics_come_from_the_pruned_prefix(
    make_model: Any, make_tokens: Any, capture: Any
) -> None:
    model, tokens = make_model("llama", num_hidden_layers=2, seed=3), make_tokens(12, 16)
    orders = _sequential(model, tokens).orders(PLAN)
    dense = capture(model, tokens)
    groups, channels = (_falling(x) for x in _scores(model.model.layers[0], dense[0]))
    assert orders[0].groups.tolist() == groups
    assert orders[0].channels.tolist() == channels
    masked = capture(_silenced(model, groups[:1], channels[:16]), tokens)
    expected = [_falling(x) for x in _scores(model.model.layers[1], masked[1])]
    assert orders[1].groups.tolist() == expected[0]
    assert orders[1].channels.tolist() == expected[1]
    on_dense = [_falling(x) for x in _scores(model.model.layers[1], dense[1])]
    assert on_dense != expected, "the case does not tell the two prefixes apart"


@pytest.mark.parametrize("reconstruction", ["none", "least_squares"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pruning_nothing_is_the_dense_model(
    make_model: Any, make_tokens: Any, logits_of: Any, family: str, reconstruction: str
) -> None:
    model, tokens = make_model(family), make_tokens(3, 14)
    sequential = _sequential(model, make_tokens(12, 16), reconstruction)
    logits = logits_of(sequential, Plan.dense(family_of(model)[1]), tokens)
    assert torch.allclose(logits, model(tokens).logits, rtol=0, atol=1e-9)


def test_sequential_is_sliced(make_model: Any, make_tokens: Any, logits_of: Any) -> None:
    model = make_model("qwen3", num_hidden_layers=2)
    sequential = _sequential(model, make_tokens(12, 16), "least_squares")
    tokens = make_tokens(3, 14)
    expected = logits_of(sequential, PLAN, tokens)
    assert torch.allclose(sliced(sequential, PLAN)(tokens).logits, expected, rtol=0, atol=1e-9)


def test_plans_do_not_disturb_each_other(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("llama", num_hidden_layers=2), make_tokens(3, 14)
    calibration = make_tokens(12, 16)
    other = Plan.from_json([[4, 2, 8], [1, 2, 48]])
    mixed = dict(_sequential(model, calibration).hidden_states([PLAN, other, PLAN], tokens))
    fresh = dict(_sequential(model, calibration).hidden_states([other], tokens))
    assert torch.equal(mixed[0], mixed[2])
    assert torch.equal(mixed[1], fresh[0])
    assert not torch.equal(mixed[0], mixed[1])
