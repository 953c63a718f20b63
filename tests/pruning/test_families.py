"""The layer-by-layer forward pass against the stock one, and the window it cannot model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pruning.elastic import Recipe
from pruning.families import FAMILIES, family_of, run_layer
from pruning.plan import Plan
from pruning.sequential import SequentialModel

WINDOWS = [
    pytest.param("mistral", {"sliding_window": 8}, id="mistral"),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        id="qwen2",
    ),
]
REFUSAL = r"^data\.length: got 16 tokens, this model attends within a window of 8; use at most.*$"


def _by_layer(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    family, _ = family_of(model)
    hidden = family.embed(model, tokens)
    rotary = family.rotary(model, hidden)
    for layer in family.layers(model):
        hidden = run_layer(layer, hidden, rotary)
    return family.final_norm(model)(hidden) @ family.head(model).T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_stock_forward(
    make_model: Any, make_tokens: Any, family: str, tied: bool
) -> None:
    model, tokens = make_model(family, kv_heads=2, tied=tied), make_tokens(3, 20)
    assert torch.allclose(_by_layer(model, tokens), model(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "fields"), WINDOWS)
def test_within_the_window_equals_the_stock_forward(
    make_model: Any, make_tokens: Any, family: str, fields: dict[str, Any]
) -> None:
    model, tokens = make_model(family, **fields), make_tokens(3, 8)
    assert torch.allclose(_by_layer(model, tokens), model(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "fields"), WINDOWS)
def test_longer_than_the_window_is_refused(
    make_model: Any, make_tokens: Any, rank: Any, family: str, fields: dict[str, Any]
) -> None:
    """Everywhere tokens enter: ranking, running a plan, sequential calibration."""
    model = make_model(family, **fields)
    adapter, architecture = family_of(model)
    with pytest.raises(ValueError, match=REFUSAL):
        rank(model)
    recipe = Recipe("wanda_sp", "none", 0.01)
    sequential = SequentialModel(model, adapter, architecture, make_tokens(4, 16), recipe)
    with pytest.raises(ValueError, match=REFUSAL):
        sequential.parameters(Plan.dense(architecture))
    with pytest.raises(ValueError, match=REFUSAL):
        _by_layer(model, make_tokens(1, 16))


def test_the_window_matters(make_model: Any, make_tokens: Any) -> None:
    """Without the refusal the result would be silently wrong."""
    tokens = make_tokens(1, 16)
    narrow, wide = (make_model("mistral", sliding_window=width) for width in (8, 64))
    assert not torch.allclose(narrow(tokens).logits, wide(tokens).logits, atol=1e-6)


def test_a_window_that_no_layer_has(make_model: Any, make_tokens: Any) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    model, tokens = make_model("qwen2", **fields), make_tokens(3, 20)
    assert torch.allclose(_by_layer(model, tokens), model(tokens).logits, rtol=0, atol=1e-9)


def test_unsupported_models_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match=r"^config\.json: model_type 'gpt2' is not supported; .*$"):
        family_of(model)
