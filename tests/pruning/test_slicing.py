"""Slicing where dense biases, odd head counts and shared storage make it hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.export import is_stock
from pruning.families import family_of
from pruning.plan import Plan
from pruning.slicing import layer_plan, sliced

UNEVEN = Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]])
UNIFORM = Plan.from_json([[2, 2, 32]] * 3)
BIASED = [
    pytest.param("llama", {"attention_bias": True}, id="llama-attention"),
    pytest.param("llama", {"mlp_bias": True}, id="llama-mlp"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-both"),
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3-attention"),
]


@pytest.mark.parametrize("plan", [UNEVEN, UNIFORM], ids=["uneven", "uniform"])
@pytest.mark.parametrize("reconstruction", ["none", "bias", "least_squares"])
@pytest.mark.parametrize(("family", "fields"), BIASED)
def test_dense_output_biases_survive(  # one bias of the dense pair may be missing
    make_model: Any,
    rank: Any,
    logits_of: Any,
    make_tokens: Any,
    family: str,
    fields: dict[str, Any],
    reconstruction: str,
    plan: Plan,
) -> None:
    elastic = rank(make_model(family, **fields), reconstruction)
    small = sliced(elastic, plan)
    tokens = make_tokens(2, 16)
    logits = logits_of(elastic, plan, tokens)
    assert torch.allclose(small(tokens).logits, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "fields"), BIASED)
def test_uncorrected_cut_leaves_output_biases_alone(
    make_model: Any, rank: Any, family: str, fields: dict[str, Any]
) -> None:
    elastic = rank(make_model(family, **fields), "none")
    dense = dict(elastic.model.named_parameters())
    for index, layer in enumerate(elastic.parameters(UNEVEN)):
        for role in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
            name = f"model.layers.{index}.{role}"
            assert (role in layer) == (name in dense)
            if role in layer:
                assert torch.equal(layer[role], dense[name])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_that_do_not_divide_the_hidden_size(
    make_model: Any, rank: Any, logits_of: Any, make_tokens: Any, family: str
) -> None:
    """Three heads of 8 in a hidden size of 64: some stock configurations refuse that."""
    plan = Plan.from_json([[3, 1, 32]] * 3)
    elastic = rank(make_model(family, kv_heads=8), "none")
    small = sliced(elastic, plan)
    tokens = make_tokens(2, 16)
    assert layer_plan(small) == plan
    assert torch.allclose(small(tokens).logits, logits_of(elastic, plan, tokens), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_embeddings_with_heads_that_differ(
    make_model: Any,
    rank: Any,
    logits_of: Any,
    make_tokens: Any,
    tmp_path: Path,
    family: str,
    rope: dict[str, Any],
) -> None:
    dense = make_model(family, rope_parameters=rope | {"rope_theta": 1e4})
    elastic = rank(dense, "bias")
    small = sliced(elastic, UNEVEN)
    tokens = make_tokens(2, 60)
    logits = logits_of(elastic, UNEVEN, tokens)
    assert torch.allclose(small(tokens).logits, logits, rtol=0, atol=1e-9)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(tokens).logits, small(tokens).logits)


def test_layer_plan_of_dense_models(make_model: Any) -> None:
    for kv_heads in (2, 8):
        model = make_model("qwen2", kv_heads=kv_heads)
        assert layer_plan(model) == Plan.dense(family_of(model)[1])


@pytest.mark.parametrize("plan", [UNEVEN, UNIFORM], ids=["uneven", "uniform"])
def test_weights_are_copies(make_model: Any, rank: Any, plan: Plan, make_tokens: Any) -> None:
    """What happens to the sliced model must not reach the dense one, nor the elastic one."""
    elastic = rank(make_model("llama"), "least_squares")
    tokens = make_tokens(1, 12)
    before = elastic.model(tokens).logits.clone()
    first, again = sliced(elastic, plan), sliced(elastic, plan)
    expected = again(tokens).logits.clone()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(elastic.model(tokens).logits, before)
    assert torch.equal(again(tokens).logits, expected)
    assert torch.equal(sliced(elastic, plan)(tokens).logits, expected)


def test_sliced_models_are_ready(make_model: Any, rank: Any) -> None:
    """In evaluation mode, with the dense model's generation settings and attention kernel."""
    dense = make_model("llama")
    dense.generation_config.max_new_tokens = 17
    for plan in (UNEVEN, UNIFORM):
        small = sliced(rank(dense, "none"), plan)
        assert not small.training
        assert small.generation_config.max_new_tokens == 17
        assert small.config._attn_implementation == dense.config._attn_implementation
        assert is_stock(small) == plan.is_uniform
