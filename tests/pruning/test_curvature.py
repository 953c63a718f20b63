"""Curvature against gradients of the whole stock model, and against divergences themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning import curvature
from pruning.curvature import LayerCurvature, stream_curvature
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.families import family_of
from pruning.plan import Grid

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
BLOCKS = ("self_attn.o_proj", "mlp.down_proj")


def _curvature(model: Any, tokens: Tensor, **options: Any) -> list[LayerCurvature]:
    return stream_curvature(model, family_of(model)[0], tokens, **options)


def _gradients(model: Any, tokens: Tensor, seed: int) -> dict[str, list[Tensor]]:
    """Gradients of the drawn tokens' log-likelihood, by one backward pass through stock code."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_full_backward_hook(
            lambda _, __, out, name=name: found.setdefault(name, []).append(out[0].flatten(0, 1))
        )
        for name, module in model.named_modules()
        if name.endswith(BLOCKS)
    ]
    entering = model.model.embed_tokens(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=entering).logits.float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1, generator=generator)
    logits.flatten(0, 1).log_softmax(-1).gather(1, drawn).sum().backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("rows", [curvature._ROWS, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_roots_are_those_of_the_fisher_matrix(
    make_model: Any, make_tokens: Any, monkeypatch: pytest.MonkeyPatch, family: str, rows: int
) -> None:
    monkeypatch.setattr(curvature, "_ROWS", rows)
    model, tokens = make_model(family, dtype=torch.float64), make_tokens(12, 16)
    gradients = _gradients(model, tokens, seed=3)
    for index, layer in enumerate(_curvature(model, tokens, batch_size=12, seed=3)):
        for name, root in zip(BLOCKS, (layer.attention, layer.mlp), strict=True):
            (rows,) = gradients[f"model.layers.{index}.{name}"]
            half = rows.T @ rows / (2 * len(rows))
            scale = half.diagonal().mean().item()
            assert torch.allclose(root.T @ root, half, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("index", [0, 2])
def test_small_errors_cost_the_divergence_that_is_foretold(
    make_model: Any, make_tokens: Any, block: str, index: int
) -> None:
    """White noise in a block's output: E|R d|^2 = variance tr(R'R) nats a token."""
    model, tokens = make_model("llama", dtype=torch.float64), make_tokens(256, 16)
    layer = _curvature(model, tokens)[index]
    root = layer.attention if block == BLOCKS[0] else layer.mlp
    deviation, generator = 1e-2, torch.Generator().manual_seed(1)

    def noisy(_: Any, __: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, dtype=output.dtype, generator=generator)
        return output + deviation * noise

    with torch.no_grad():
        dense = model(tokens).logits.log_softmax(-1)
        handle = model.get_submodule(f"model.layers.{index}.{block}").register_forward_hook(noisy)
        other = model(tokens).logits.log_softmax(-1)
        handle.remove()
    measured = float((dense.exp() * (dense - other)).sum(-1).mean())
    assert measured == pytest.approx(deviation**2 * float(root.square().sum()), rel=0.1)


def test_a_seed_draws_the_same_tokens(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("llama"), make_tokens(4, 16)
    one, again, other = (_curvature(model, tokens, seed=seed)[0].mlp for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_micro_batches_change_nothing_but_the_order_of_sums(
    make_model: Any, make_tokens: Any
) -> None:
    model, tokens = make_model("llama", dtype=torch.float64), make_tokens(5, 16)
    whole, parts = (_curvature(model, tokens, batch_size=size) for size in (5, 2))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a.mlp.T @ a.mlp, b.mlp.T @ b.mlp)
        assert torch.allclose(a.attention.T @ a.attention, b.attention.T @ b.attention)


def test_predictions_that_nothing_moves_have_no_curvature(
    make_model: Any, make_tokens: Any
) -> None:
    """A head of zeros predicts every token alike, whatever the layers write."""
    model = make_model("llama", dtype=torch.float64)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    for layer in _curvature(model, make_tokens(2, 8)):
        assert float(layer.mlp.abs().max()) < 1e-2
        assert bool(layer.attention.isfinite().all())


def test_activations_that_are_not_finite_are_named(make_model: Any, make_tokens: Any) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    message = "^calibration: the activations are not finite; try dtype: float32$"
    with pytest.raises(ValueError, match=message):
        _curvature(model, make_tokens(2, 8))


def test_gradients_that_are_not_finite_are_named(make_model: Any, make_tokens: Any) -> None:
    """Forward all is well; the way back overflows in a norm that divides by next to nothing."""
    model = make_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e3)
        model.model.embed_tokens.weight.mul_(1e-5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    message = "^pruning.fisher_tokens: a gradient is not finite; try dtype: float32$"
    with pytest.raises(ValueError, match=message):
        _curvature(model, make_tokens(2, 8))


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_cut_errors_are_divergences_in_nats(
    make_model: Any, capture: Any, make_tokens: Any, unit: Any
) -> None:
    """|R d|^2 of what a cut takes from each block's output, over the tokens seen."""
    model, tokens = make_model("llama", kv_heads=2, dtype=torch.float64), make_tokens(12, 16)
    curvature = _curvature(model, tokens)
    recipe = Recipe("wifv", "none", 0.01, unit)
    elastic = ElasticModel.rank(model, *family_of(model), tokens, recipe, curvature=curvature)
    grid = Grid.of(family_of(model)[1], 20, unit)
    captured = capture(model, tokens)
    for index, (layer, seen) in enumerate(zip(elastic.layers, captured, strict=True)):
        attention, mlp = layer.cut_errors(grid, curvature[index])
        stock, roots = model.model.layers[index], curvature[index]
        for level, kept in enumerate(grid.mlp):
            lost = layer.order.channels[kept:].tolist()
            change = seen.rows("mlp")[:, lost] @ stock.mlp.down_proj.weight[:, lost].T @ roots.mlp.T
            assert mlp[level] == pytest.approx(float(change.square().sum(1).mean()), rel=1e-4)
        for level, kept in enumerate(grid.attention):
            heads = layer.order.heads
            gone = heads[kept:] if unit == "kv_group" else heads[:, kept:]
            lost = [8 * head + i for head in gone.flatten().tolist() for i in range(8)]
            output = stock.self_attn.o_proj.weight[:, lost].T
            change = seen.rows("attention")[:, lost] @ output @ roots.attention.T
            expected = float(change.square().sum(1).mean())
            assert attention[level] == pytest.approx(expected, rel=1e-4)
        assert attention[-1] == mlp[-1] == 0


def test_units_are_ranked_by_what_they_do_to_predictions(
    make_model: Any, capture: Any, make_tokens: Any
) -> None:
    """WIFV of the measured output: the variance of a channel times |R W_:,j|^2."""
    model, tokens = make_model("llama", dtype=torch.float64), make_tokens(12, 16)
    curvature = _curvature(model, tokens)
    recipe = Recipe("wifv", "bias", 0.01)
    measured, plain = (
        ElasticModel.rank(model, *family_of(model), tokens, recipe, curvature=measures)
        for measures in (curvature, None)
    )
    captured = capture(model, tokens)
    for index, layer in enumerate(measured.layers):
        weight = curvature[index].mlp @ model.model.layers[index].mlp.down_proj.weight
        scores = captured[index].rows("mlp").var(0) * weight.square().sum(0)
        assert layer.order.channels.tolist() == scores.argsort(descending=True).tolist()
    assert any(
        a.order.channels.tolist() != b.order.channels.tolist()
        for a, b in zip(measured.layers, plain.layers, strict=True)
    )
