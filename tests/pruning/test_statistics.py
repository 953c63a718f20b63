"""Statistics against float64 sums over the activations of a stock forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.families import family_of
from pruning.statistics import BlockStatistics, LayerStatistics, Moments, stream_statistics

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _streamed(model: Any, tokens_BT: Tensor, batch_size: int) -> list[LayerStatistics]:
    return list(stream_statistics(model, family_of(model)[0], tokens_BT, batch_size))


def _assert_moments(found: BlockStatistics, x: Tensor, residual: Tensor, tolerance: float) -> None:
    """Compare with sums token by token, in float64."""
    x, residual = x.double(), residual.double()
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x:
        gram += torch.outer(row, row)
    energies = sorted(float((row * row).sum()) for row in residual)
    close = {"rtol": tolerance, "atol": tolerance}
    assert found.count == len(x)
    assert torch.allclose(found.mean, sum(x) / len(x), **close)
    assert torch.allclose(found.square, sum(row * row for row in x) / len(x), **close)
    assert torch.allclose(found.gram.double(), gram / len(x), **close)
    assert torch.allclose(found.variance, x.var(0, correction=1), **close)
    assert found.residual_energy == pytest.approx(energies[(len(x) - 1) // 2], rel=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_layers_agree_with_a_full_forward(
    make_model: Any, make_tokens: Any, capture: Any, family: str, kv_heads: int
) -> None:
    model, tokens = make_model(family, kv_heads=kv_heads), make_tokens(5, 12)
    streamed = _streamed(model, tokens, 2)
    assert len(streamed) == 3
    for found, seen in zip(streamed, capture(model, tokens), strict=True):
        attention, mlp = seen.rows("attention"), seen.rows("mlp")
        _assert_moments(found.attention, attention, seen.rows("after_attention"), 1e-10)
        _assert_moments(found.mlp, mlp, seen.rows("after_mlp"), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_and_single_precision_are_summed_wide(
    make_model: Any, make_tokens: Any, capture: Any, dtype: torch.dtype
) -> None:
    """The oracle sees the same rounded activations; only the sums may differ.

    One micro-batch: in half precision another batch shape may round the activations themselves.
    """
    model, tokens = make_model("llama", dtype=dtype), make_tokens(6, 16)
    for found, seen in zip(_streamed(model, tokens, 6), capture(model, tokens), strict=True):
        assert found.mlp.gram.dtype == torch.float32
        assert found.mlp.mean.dtype == found.mlp.square.dtype == torch.float64
        _assert_moments(found.mlp, seen.rows("mlp"), seen.rows("after_mlp"), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
def test_batch_size_does_not_matter(make_model: Any, make_tokens: Any, batch_size: int) -> None:
    model, tokens = make_model("qwen3"), make_tokens(7, 10)
    for found, whole in zip(
        _streamed(model, tokens, batch_size), _streamed(model, tokens, 7), strict=True
    ):
        for one, other in ((found.attention, whole.attention), (found.mlp, whole.mlp)):
            assert one.count == other.count == 70
            assert torch.allclose(one.mean, other.mean, rtol=0, atol=1e-12)
            assert torch.allclose(one.gram, other.gram, rtol=0, atol=1e-12)
            assert one.residual_energy == pytest.approx(other.residual_energy, rel=1e-6)


def test_sums_do_not_drift() -> None:
    """A mean of 1000 with a spread of 1e-3 over 64,000 tokens: float32 sums would lose it."""
    generator = torch.Generator().manual_seed(0)
    moments, rows = Moments(), []
    for _ in range(64):
        x = (1000 + 1e-3 * torch.randn(10, 100, 2, generator=generator)).float()
        moments.add(x)
        moments.add_residual(x)
        rows.append(x.double().flatten(0, 1))
    exact = torch.cat(rows)
    assert torch.allclose(moments.finish().mean, exact.mean(0), rtol=1e-9, atol=0)


def test_moments_by_hand() -> None:
    moments = Moments()
    for batch in ([[[1.0, 2.0]], [[3.0, 0.0]]], [[[5.0, 4.0]]]):
        x = torch.tensor(batch)
        moments.add(x)
        moments.add_residual(10 * x)
    found = moments.finish()
    assert found.count == 3
    assert found.mean.tolist() == [3.0, 2.0]
    assert found.square.tolist() == pytest.approx([35 / 3, 20 / 3])
    assert found.variance.tolist() == pytest.approx([4.0, 4.0])
    assert found.gram.flatten().tolist() == pytest.approx([35 / 3, 22 / 3, 22 / 3, 20 / 3])
    assert found.residual_energy == pytest.approx(900.0)  # of 500, 900, 4100


def test_constant_channels_have_no_variance() -> None:
    """Up to the rounding of a square in float32, and never below 0."""
    moments = Moments()
    x = torch.full((1, 7, 1), 0.1)
    moments.add(x)
    moments.add_residual(x)
    variance = moments.finish().variance
    assert 0 <= float(variance) < 1e-7 * 0.1**2


def test_statistics_leave_the_model_alone(
    make_model: Callable[..., Any], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model("llama"), make_tokens(2, 8)
    before = model(tokens).logits
    _streamed(model, tokens, 2)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens).logits, before)


def test_activations_that_overflow_are_refused(make_model: Any, make_tokens: Any) -> None:
    model = make_model("llama", dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="activations are not finite; try dtype: float32"):
        _streamed(model, make_tokens(2, 8), 2)
