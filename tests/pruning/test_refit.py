"""The final refit against direct solutions, its limits, and what it does to a pruned model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruning.families import family_of
from pruning.plan import Plan
from pruning.ranking import Order
from pruning.refit import RIDGES, CrossMoments, RidgeFit, error, refit
from pruning.slicing import sliced

Array = NDArray[np.float64]
UNEVEN = Plan.from_json([[2, 2, 32], [3, 2, 40], [1, 2, 16]])


def _data() -> tuple[Array, Array, Array]:
    """Inputs (T, N), targets (T, D) and the weight before (D, N)."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 1.0
    return x, rng.normal(size=(50, 4)) + x[:, :4], rng.normal(size=(4, 6))


def _moments(x: Array, y: Array, with_bias: bool) -> CrossMoments:
    moments = CrossMoments(with_bias)
    for start in range(0, len(x), 10):
        part = slice(start, start + 10)
        moments.add(torch.tensor(x[part]).unsqueeze(0), torch.tensor(y[part]).unsqueeze(0))
    return moments


def _direct(x: Array, y: Array, before: Array, ridge: float, with_bias: bool) -> Array:
    """Ordinary least squares with the damping as extra rows; a bias column has no such row."""
    scale = math.sqrt(len(x))
    pull = np.diag(np.sqrt(ridge * (x * x).mean(0)))
    goal = pull @ before[:, : x.shape[1]].T
    if with_bias:
        x = np.hstack([x, np.ones((len(x), 1))])
        pull = np.hstack([pull, np.zeros((len(pull), 1))])
    rows = np.vstack([x / scale, pull])
    return np.linalg.lstsq(rows, np.vstack([y / scale, goal]), rcond=None)[0].T


def _before(weight: Array, with_bias: bool) -> Tensor:
    column = np.full((len(weight), 1), 0.5)
    return torch.tensor(np.hstack([weight, column]) if with_bias else weight)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_a_ridge_fit_is_the_direct_solution(ridge: float, with_bias: bool) -> None:
    x, y, weight = _data()
    before = _before(weight, with_bias)
    found = RidgeFit(before, _moments(x, y, with_bias)).towards(ridge)
    expected = _direct(x, y, weight, ridge, with_bias)
    assert np.allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_the_ridge_is_blind_to_the_scale_of_a_channel() -> None:
    x, y, weight = _data()
    scales = np.array([1e-3, 1.0, 50.0, 1.0, 1.0, 2.0])
    plain = RidgeFit(torch.tensor(weight), _moments(x, y, False)).towards(0.3).numpy()
    found = RidgeFit(torch.tensor(weight / scales), _moments(x * scales, y, False)).towards(0.3)
    assert np.allclose(found.numpy() * scales, plain, rtol=1e-9, atol=1e-9)


def test_a_dead_channel_keeps_its_weight() -> None:
    x, y, weight = _data()
    x[:, 2] = 0.0
    found = RidgeFit(torch.tensor(weight), _moments(x, y, False)).towards(0.3).numpy()
    assert np.array_equal(found[:, 2], weight[:, 2])
    still = RidgeFit(torch.tensor(weight), _moments(0 * x, y, False)).towards(0.3).numpy()
    assert np.array_equal(still, weight)


@pytest.mark.parametrize("with_bias", [False, True])
def test_limits_of_the_ridge(with_bias: bool) -> None:
    x, y, weight = _data()
    moments, before = _moments(x, y, with_bias), _before(weight, with_bias)
    stiff = RidgeFit(before, moments).towards(1e9).numpy()
    assert np.allclose(stiff[:, :6], weight, atol=1e-6)
    if with_bias:  # free of damping: it takes the mean residual
        assert np.allclose(stiff[:, 6], (y - x @ weight.T).mean(0), atol=1e-5)
    free = RidgeFit(before, moments).towards(1e-12).numpy()
    assert np.allclose(free, _direct(x, y, weight, 0.0, with_bias), atol=1e-6)


def test_error_is_explicit() -> None:
    x, y, weight = _data()
    by_hand = sum(float(((weight @ a - b) ** 2).sum()) for a, b in zip(x, y, strict=True)) / len(x)
    assert error(torch.tensor(weight), _moments(x, y, False).means()) == pytest.approx(
        by_hand, rel=1e-10
    )
    with_bias = np.hstack([weight, np.full((4, 1), 0.5)])
    shifted = sum(
        float(((weight @ a + 0.5 - b) ** 2).sum()) for a, b in zip(x, y, strict=True)
    ) / len(x)
    found = error(torch.tensor(with_bias), _moments(x, y, True).means())
    assert found == pytest.approx(shifted, rel=1e-10)


def test_merged_moments_are_those_of_all_tokens() -> None:
    x, y, _ = _data()
    whole = _moments(x, y, True)
    halves = (_moments(x[:20], y[:20], True), _moments(x[20:], y[20:], True))
    for first, second in ((whole, CrossMoments(True)), halves):
        merged = first.merged(second)
        assert merged.count == 50
        for one, other in zip(merged.means()[:2], whole.means()[:2], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)
        assert merged.means()[2] == pytest.approx(whole.means()[2])


def _pruned(
    make_model: Any, rank: Any, family: str, reconstruction: str, unit: str = "kv_group"
) -> tuple[Any, Any, list[Order]]:
    dense = make_model(family)
    elastic = rank(dense, reconstruction, unit)
    return dense, sliced(elastic, UNEVEN), elastic.orders(UNEVEN)


def _stream_errors(capture: Any, dense: Any, small: Any, tokens: Tensor) -> list[float]:
    """Mean squared distance of the residual stream from the dense one, after every layer."""
    pairs = zip(capture(small, tokens), capture(dense, tokens), strict=True)
    return [
        float((a.rows("after_mlp") - b.rows("after_mlp")).square().sum(1).mean()) for a, b in pairs
    ]


@pytest.mark.parametrize("reconstruction", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_refit_repairs_the_residual_stream(
    make_model: Any, rank: Any, make_tokens: Any, capture: Any, family: str, reconstruction: str
) -> None:
    dense, small, orders = _pruned(make_model, rank, family, reconstruction)
    tokens = make_tokens(16, 16)
    before = _stream_errors(capture, dense, small, tokens)
    names = set(dict(small.named_parameters()))
    seen: list[int] = []
    (ridges,) = refit(
        [small], dense, family_of(dense)[0], [orders], tokens, batch_size=2, on_layer=seen.append
    )
    after = _stream_errors(capture, dense, small, tokens)
    assert all(late < early for late, early in zip(after, before, strict=True))
    assert set(dict(small.named_parameters())) == names
    assert seen == [0, 1, 2]
    assert all(ridge in RIDGES for pair in ridges for ridge in pair)


def test_only_output_projections_change(make_model: Any, rank: Any, make_tokens: Any) -> None:
    dense, small, orders = _pruned(make_model, rank, "qwen2", "bias")
    before = {name: x.clone() for name, x in small.named_parameters()}
    dense_before = {name: x.clone() for name, x in dense.named_parameters()}
    refit([small], dense, family_of(dense)[0], [orders], make_tokens(16, 16), batch_size=2)
    for name, parameter in small.named_parameters():
        is_output = "o_proj" in name or "down_proj" in name
        assert torch.equal(parameter, before[name]) != is_output, name
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, dense_before[name])


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_a_dense_copy_stays_put(make_model: Any, make_tokens: Any, fields: dict[str, Any]) -> None:
    dense = make_model("llama", **fields)
    copied = copy.deepcopy(dense)
    family, architecture = family_of(dense)
    heads = torch.arange(architecture.heads).view(architecture.kv_heads, -1)
    groups, channels = torch.arange(architecture.kv_heads), torch.arange(architecture.mlp)
    orders = [Order(groups, heads, channels)] * architecture.layers
    refit([copied], dense, family, [orders], make_tokens(16, 16), batch_size=2)
    for one, other in zip(copied.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def _blocks(
    capture: Any, dense: Any, small: Any, tokens: Tensor, target: str = "stream"
) -> list[tuple[Array, Array]]:
    """For each block of the pruned model: its inputs, and what it should add to the stream."""
    stream = dense_stream = small.model.embed_tokens(tokens).flatten(0, 1)
    pairs = []
    for seen, goal in zip(capture(small, tokens), capture(dense, tokens), strict=True):
        for inputs, after in (("attention", "after_attention"), ("mlp", "after_mlp")):
            missing = goal.rows(after) - (stream if target == "stream" else dense_stream)
            pairs.append((seen.rows(inputs).numpy(), missing.detach().numpy()))
            stream, dense_stream = seen.rows(after), goal.rows(after)
    return pairs


def _outputs(small: Any) -> list[Any]:
    return [
        x for layer in small.model.layers for x in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]


@pytest.mark.parametrize("target", ["stream", "block"])
@pytest.mark.parametrize("reconstruction", ["none", "bias"])
def test_every_block_is_the_direct_solution(
    make_model: Any, rank: Any, make_tokens: Any, capture: Any, reconstruction: str, target: Any
) -> None:
    """On the inputs of the refitted prefix; the goal is the dense stream or the dense block."""
    dense, small, orders = _pruned(make_model, rank, "llama", reconstruction)
    tokens, with_bias = make_tokens(16, 16), reconstruction == "bias"
    before = [linear.weight.detach().clone().numpy() for linear in _outputs(small)]
    family = family_of(dense)[0]
    (chosen,) = refit([small], dense, family, [orders], tokens, target=target, batch_size=2)
    ridges = [ridge for pair in chosen for ridge in pair]
    blocks = _blocks(capture, dense, small, tokens, target)
    for linear, (x, y), old, ridge in zip(_outputs(small), blocks, before, ridges, strict=True):
        expected = _direct(x, y, old, ridge, with_bias)
        assert np.allclose(linear.weight.detach(), expected[:, : x.shape[1]], rtol=0, atol=1e-6)
        assert (linear.bias is not None) == with_bias
        if with_bias:
            assert np.allclose(linear.bias.detach(), expected[:, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_the_refit_takes_the_place_of_the_correction(
    make_model: Any, rank: Any, make_tokens: Any, unit: str
) -> None:
    """The ridge pulls towards the dense columns, whichever correction came before."""
    models = []
    for reconstruction in ("bias", "least_squares"):
        dense, small, orders = _pruned(make_model, rank, "qwen3", reconstruction, unit)
        refit([small], dense, family_of(dense)[0], [orders], make_tokens(16, 16), batch_size=2)
        models.append(small)
    for one, other in zip(*(x.parameters() for x in models), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reconstruction", ["none", "bias"])
def test_ridges_do_best_on_held_out_tokens(
    make_model: Any, rank: Any, make_tokens: Any, capture: Any, reconstruction: str
) -> None:
    """Eight batches of two sequences of 16: the last is the one that the fits do not see."""
    dense, small, orders = _pruned(make_model, rank, "llama", reconstruction)
    tokens, with_bias = make_tokens(16, 16), reconstruction == "bias"
    before = [linear.weight.detach().clone().numpy() for linear in _outputs(small)]
    (chosen,) = refit([small], dense, family_of(dense)[0], [orders], tokens, batch_size=2)
    blocks, seen = _blocks(capture, dense, small, tokens), 14 * 16
    for (x, y), old, ridge in zip(
        blocks, before, [r for pair in chosen for r in pair], strict=True
    ):
        rows = np.hstack([x, np.ones((len(x), 1))]) if with_bias else x
        fits = [_direct(x[:seen], y[:seen], old, candidate, with_bias) for candidate in RIDGES]
        errors = [float(((rows[seen:] @ fit.T - y[seen:]) ** 2).sum()) for fit in fits]
        assert ridge == RIDGES[int(np.argmin(errors))]


def test_one_batch_has_nothing_to_hold_out(make_model: Any, rank: Any, make_tokens: Any) -> None:
    dense, small, orders = _pruned(make_model, rank, "llama", "bias")
    (ridges,) = refit(
        [small], dense, family_of(dense)[0], [orders], make_tokens(4, 16), batch_size=8
    )
    assert ridges == [(0.3, 0.3)] * 3


def test_a_model_that_overflows_is_left_as_it_is(
    make_model: Any, rank: Any, make_tokens: Any
) -> None:
    """Beside one that does not: that is refitted as alone."""
    dense, sound, orders = _pruned(make_model, rank, "llama", "bias")
    _, broken, _ = _pruned(make_model, rank, "llama", "bias")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = [x.weight.clone() for x in _outputs(broken)]
    tokens = make_tokens(16, 16)
    ridges = refit([broken, sound], dense, family_of(dense)[0], [orders] * 2, tokens, batch_size=2)
    flat = [x for pair in ridges[0] for x in pair]
    assert [math.isinf(x) for x in flat] == [False] * 3 + [True] * 3
    for linear, weight in list(zip(_outputs(broken), before, strict=True))[3:]:
        assert torch.equal(linear.weight, weight)
    _, alone, _ = _pruned(make_model, rank, "llama", "bias")
    (expected,) = refit([alone], dense, family_of(dense)[0], [orders], tokens, batch_size=2)
    assert ridges[1] == expected


def test_several_models_are_refitted_as_each_alone(
    make_model: Any, rank: Any, make_tokens: Any
) -> None:
    dense = make_model("qwen2")
    family, elastic, tokens = family_of(dense)[0], rank(dense, "bias"), make_tokens(16, 16)
    plans = [UNEVEN, Plan.from_json([[1, 2, 48], [2, 2, 16], [4, 2, 32]])]
    orders = [elastic.orders(plan) for plan in plans]
    together = [sliced(elastic, plan) for plan in plans]
    ridges = refit(together, dense, family, orders, tokens, batch_size=2)
    for plan, order, model, chosen in zip(plans, orders, together, ridges, strict=True):
        alone = sliced(elastic, plan)
        assert refit([alone], dense, family, [order], tokens, batch_size=2) == [chosen]
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)
