"""The elastic model: correct cuts on real activations, the trie, the cache, relative errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.elastic import ElasticModel, run_plan
from pruning.families import family_of
from pruning.plan import Grid, Plan
from pruning.ranking import order_hash


def _columns(heads: Tensor) -> list[int]:
    return [head * 8 + i for head in heads.flatten().tolist() for i in range(8)]


def _direct(x: Tensor, weight: Tensor, kept: list[int], ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge solution on the kept dense columns, from the data; the order plays no part in it."""
    mean = x.mean(0)
    centred = x - mean
    damping = ridge * float(centred.square().mean(0).mean())
    scale, pull = len(x) ** 0.5, damping**0.5 * torch.eye(len(kept), dtype=x.dtype)
    rows = torch.cat([centred[:, kept] / scale, pull])
    goal = torch.cat([centred @ weight.T / scale, pull @ weight[:, kept].T])
    solution = torch.linalg.lstsq(rows, goal).solution.T
    return solution, weight @ mean - solution @ mean[kept]


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_least_squares_cuts_solve_for_the_dense_outputs(
    make_model: Any, rank: Any, capture: Any, make_tokens: Any, family: str, unit: str
) -> None:
    model = make_model(family)
    row = [3, 2, 24] if unit == "kv_group" else [4, 1, 24]
    plan = Plan.from_json([row] * 3)
    elastic = rank(model, "least_squares", unit, ridge=0.01)
    layers = zip(
        capture(model, make_tokens(12, 16)),
        elastic.parameters(plan),
        elastic.orders(plan),
        model.model.layers,
        strict=True,
    )
    for seen, found, order, dense in layers:
        heads = _columns(order.heads[: row[0], : row[1]])
        channels = order.channels[: row[2]].tolist()
        for name, x, weight, kept in (
            ("self_attn.o_proj", seen.rows("attention"), dense.self_attn.o_proj.weight, heads),
            ("mlp.down_proj", seen.rows("mlp"), dense.mlp.down_proj.weight, channels),
        ):
            expected, bias = _direct(x, weight, kept, 0.01)
            assert torch.allclose(found[f"{name}.weight"], expected, rtol=0, atol=1e-7)
            assert torch.allclose(found[f"{name}.bias"], bias, rtol=0, atol=1e-7)


def test_kept_units_are_the_important_ones(
    make_model: Any, rank: Any, capture: Any, make_tokens: Any, plans: Any
) -> None:
    """Wanda-sp by hand on captured activations: the order of groups and of channels."""
    model = make_model("mistral", kv_heads=4)
    orders = rank(model).orders(plans[0])
    captured = capture(model, make_tokens(12, 16))
    for seen, order, dense in zip(captured, orders, model.model.layers, strict=True):
        mlp = dense.mlp.down_proj.weight.abs().mean(0) * seen.rows("mlp").square().mean(0).sqrt()
        norms = seen.rows("attention").square().mean(0).sqrt()
        channels = dense.self_attn.o_proj.weight.abs().mean(0) * norms
        groups = [float(channels[g * 16 : (g + 1) * 16].sum()) for g in range(4)]
        assert order.channels.tolist() == sorted(range(48), key=lambda j: -float(mlp[j]))
        assert order.groups.tolist() == sorted(range(4), key=lambda g: -groups[g])


@pytest.mark.parametrize("reconstruction", ["none", "least_squares"])
def test_trie_equals_plan_by_plan(
    make_model: Any, rank: Any, make_tokens: Any, reconstruction: str, plans: Any
) -> None:
    elastic, tokens = rank(make_model("llama"), reconstruction), make_tokens(3, 14)
    together = list(elastic.hidden_states(plans, tokens))
    assert sorted(index for index, _ in together) == list(range(len(plans)))
    for index, hidden in together:
        ((_, alone),) = elastic.hidden_states([plans[index]], tokens)
        by_hand = run_plan(elastic, plans[index], elastic.parameters(plans[index]), tokens)
        assert torch.equal(hidden, alone)
        assert torch.equal(hidden, by_hand)
    by_index = dict(together)
    assert not torch.equal(by_index[0], by_index[1])
    assert torch.equal(by_index[0], by_index[3])


def test_trie_runs_shared_layers_once(
    make_model: Any, rank: Any, make_tokens: Any, plans: Any
) -> None:
    elastic = rank(make_model("llama"))
    runs = [0, 0, 0]

    def count(index: int) -> Any:
        def hook(_module: Any, _args: Any, _output: Any) -> None:
            runs[index] += 1

        return hook

    layers = elastic.model.model.layers
    handles = [layer.mlp.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    list(elastic.hidden_states(plans, make_tokens(1, 6)))
    for handle in handles:
        handle.remove()
    assert runs == [2, 3, 4]


def _small_cache(elastic: ElasticModel, num_bytes: int) -> ElasticModel:
    return ElasticModel(elastic.model, elastic.family, elastic.layers, cache_bytes=num_bytes)


def _bytes(elastic: ElasticModel) -> int:
    entries = elastic._cache.values()
    return sum(x.numel() * x.element_size() for entry in entries for x in entry.values())


@pytest.mark.parametrize("num_bytes", [30_000, 60_000, 10**9])
def test_cache_stays_under_its_limit(
    make_model: Any, rank: Any, num_bytes: int, plans: Any
) -> None:
    """The largest entry (64 x 64 doubles and a bias) is 33,280 bytes: one always stays."""
    elastic = _small_cache(rank(make_model("llama"), "least_squares"), num_bytes)
    for plan in plans + plans[::-1]:
        for index, layer in enumerate(plan.layers):
            elastic.layer_parameters(index, layer)
            assert _bytes(elastic) <= max(num_bytes, 33_280)
            assert elastic._cached_bytes == _bytes(elastic)
    # Distinct cuts: attention 2, 4 | 4, 1 | 1, 3, 4 and MLP 32, 48 | 48, 16 | 8, 24, 48.
    assert (len(elastic._cache) == 14) == (num_bytes == 10**9)


@pytest.mark.parametrize("num_bytes", [0, 50_000])
def test_results_do_not_depend_on_the_cache(
    make_model: Any, rank: Any, make_tokens: Any, num_bytes: int, plans: Any
) -> None:
    elastic, tokens = rank(make_model("qwen3"), "least_squares"), make_tokens(2, 10)
    small = _small_cache(elastic, num_bytes)
    expected = dict(elastic.hidden_states(plans, tokens))
    for _ in range(2):
        found = dict(small.hidden_states(plans, tokens))
        assert all(torch.equal(found[i], expected[i]) for i in expected)


def test_model_is_as_before(make_model: Any, rank: Any, make_tokens: Any) -> None:
    """Running plans changes neither weights nor the number of query heads a group."""
    model, tokens = make_model("llama"), make_tokens(2, 10)
    before = model(tokens).logits
    elastic = rank(model, "least_squares", "query_head")
    rows = [[4, 1, 16], [4, 2, 48], [4, 1, 48]]
    list(elastic.hidden_states([Plan.from_json(rows)], tokens))
    assert torch.equal(model(tokens).logits, before)


def test_ranking_is_reproducible(make_model: Any, rank: Any, plans: Any) -> None:
    hashes = {order_hash(rank(make_model("llama")).orders(plans[0])) for _ in range(2)}
    assert len(hashes) == 1
    other = rank(make_model("llama"), metric="magnitude").orders(plans[0])
    assert order_hash(other) not in hashes


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_cut_errors_are_relative_output_errors(
    make_model: Any, rank: Any, capture: Any, make_tokens: Any, unit: Any
) -> None:
    """Expected squared change of each block's output over the median energy of the stream."""
    model = make_model("llama", kv_heads=2)
    elastic = rank(model, "none", unit)
    grid = Grid.of(family_of(model)[1], 20, unit)
    captured = capture(model, make_tokens(12, 16))
    for index, (layer, seen) in enumerate(zip(elastic.layers, captured, strict=True)):
        attention, mlp = layer.cut_errors(grid)
        dense, order = model.model.layers[index], layer.order
        for level, kept in enumerate(grid.attention):
            gone = order.heads[kept:] if unit == "kv_group" else order.heads[:, kept:]
            lost = _columns(gone)
            change = seen.rows("attention")[:, lost] @ dense.self_attn.o_proj.weight[:, lost].T
            share = change.square().sum(1).mean() / _median(seen.rows("after_attention"))
            assert attention[level] == pytest.approx(float(share), rel=1e-5, abs=1e-12)
        for level, kept in enumerate(grid.mlp):
            lost = order.channels[kept:].tolist()
            change = seen.rows("mlp")[:, lost] @ dense.mlp.down_proj.weight[:, lost].T
            share = change.square().sum(1).mean() / _median(seen.rows("after_mlp"))
            assert mlp[level] == pytest.approx(float(share), rel=1e-5, abs=1e-12)
        assert attention[-1] == mlp[-1] == 0


def _median(rows: Tensor) -> Tensor:
    return rows.square().sum(1).median()
