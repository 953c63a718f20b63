"""Facts for allocators against loops over scores, in float64."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.facts import AllocationFacts, LayerFacts, outlier_share, standardised_scores
from pruning.families import FAMILIES, family_of
from pruning.output_projection import OutputProjection
from pruning.statistics import BlockStatistics, LayerStatistics
from pruning.units import Units

Array = NDArray[np.float64]
LLAMA = FAMILIES["llama"]
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def _statistics(x: Array) -> BlockStatistics:
    rows = torch.tensor(x)
    return BlockStatistics(len(x), rows.mean(0), rows.square().mean(0), rows.T @ rows / len(x), 1.0)


def _wifv(x: Array, weight: Array) -> Array:
    scores: Array = x.var(0, ddof=1) * (weight**2).sum(0)
    return scores


def _standardised(scores: Array) -> Array:
    result: Array = (scores - scores.mean()) / scores.std(ddof=1)
    return result


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("units", [Units(1, 12, 1), Units(1, 3, 4), Units(2, 3, 2)])
def test_scores_are_standardised_and_in_rank_order(units: Units, squared: bool) -> None:
    """Columns in the reverse order of the units: the last unit of every set first."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(40, 12)) * np.arange(1, 13) + 2.0, rng.normal(size=(5, 12))
    order = torch.arange(units.per_set).flip(0).expand(units.sets, -1)
    projection = OutputProjection(torch.tensor(weight), _statistics(x), units)
    found = standardised_scores(projection, units.columns(order), squared=squared)
    scores = _wifv(x, weight)
    by_unit = _standardised(scores**2 if squared else scores).reshape(
        units.sets, units.per_set, units.channels
    )
    expected = [by_unit[:, unit].mean() for unit in reversed(range(units.per_set))]
    assert found == pytest.approx(expected, rel=1e-10)


def test_equal_channels_have_no_spread() -> None:
    x = np.array([[1.0, 1.0], [-1.0, -1.0]])
    projection = OutputProjection(torch.ones(3, 2).double(), _statistics(x), Units(1, 2, 1))
    assert standardised_scores(projection, torch.arange(2), squared=False) == (0.0, 0.0)


def _one_outlier() -> tuple[dict[str, torch.Tensor], LayerStatistics]:
    """Seven linears 2 x 2 of ones on inputs of ones: 28 scores of 1."""
    parameters = {f"{getattr(LLAMA, role)}.weight": torch.ones(2, 2) for role in LINEARS}
    ones = torch.ones(2, dtype=torch.float64)
    block = BlockStatistics(1, ones, ones, torch.ones(2, 2), 1.0)
    return parameters, LayerStatistics(block, block, (ones, ones))


@pytest.mark.parametrize("role", LINEARS)
def test_every_linear_counts_once(role: str) -> None:
    """One score of 10 among 27 of 1: above 5 times the mean of 37 / 28; one of 6 is not."""
    parameters, statistics = _one_outlier()
    parameters[f"{getattr(LLAMA, role)}.weight"][0, 1] = -10.0
    assert outlier_share(LLAMA, parameters, statistics) == pytest.approx(100 / 28)
    parameters[f"{getattr(LLAMA, role)}.weight"][0, 1] = 5.0 * 27 / 23
    assert outlier_share(LLAMA, parameters, statistics) == 0


def test_outliers_of_a_whole_layer(make_model: Any, make_tokens: Any) -> None:
    """Against Wanda scores from the activations that hooks saw, all seven in one vector."""
    model, tokens = make_model("qwen2", num_hidden_layers=2, seed=2), make_tokens(12, 16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, 3] *= 30
            layer.self_attn.q_proj.weight[:, 5] *= 30
    family, architecture = family_of(model)
    elastic = ElasticModel.rank(
        model, family, architecture, tokens, Recipe("wifv", "bias", 0.1), batch_size=5
    )
    for index, seen in enumerate(_inputs(model, tokens)):
        scores = torch.cat([(w.abs() * x.square().mean(0).sqrt()).flatten() for w, x in seen])
        expected = 100 * float((scores > 5 * scores.mean()).double().mean())
        assert expected > 0
        assert elastic.facts.outliers[index] == pytest.approx(expected)


@torch.no_grad()
def _inputs(model: Any, tokens: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The weight and the inputs (rows) of each of the seven linears of each layer."""
    result = []
    for layer in model.model.layers:
        linears = [x for x in layer.modules() if isinstance(x, torch.nn.Linear)]
        assert len(linears) == 7
        seen: dict[torch.nn.Module, torch.Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.update({module: args[0].flatten(0, 1)})
            )
            for linear in linears
        ]
        model(tokens)
        for handle in handles:
            handle.remove()
        result.append([(linear.weight, seen[linear]) for linear in linears])
    return result


def test_flap_ranks_attention_as_its_threshold_scores_it(rank: Any, make_model: Any) -> None:
    """Groups leave in the order of their standardised scores, whose squares it sums."""
    facts = rank(make_model("llama"), "bias", "kv_group", "wifv_squared").facts
    for scores in facts.attention:
        assert list(scores) == sorted(scores, reverse=True)


@pytest.mark.parametrize(("unit", "attention"), [("kv_group", 4), ("query_head", 2)])
@pytest.mark.parametrize("metric", ["wifv", "obs"])
def test_facts_are_plain_numbers_one_a_unit(
    rank: Any, make_model: Any, unit: str, attention: int, metric: str
) -> None:
    elastic = rank(make_model("llama"), "least_squares", unit, metric)
    facts = elastic.facts
    assert isinstance(facts, AllocationFacts)
    assert len(facts.outliers) == 3
    assert [len(x) for x in facts.attention] == [attention] * 3
    assert [len(x) for x in facts.mlp] == [48] * 3
    assert AllocationFacts(**asdict(facts)) == facts
    assert json.loads(json.dumps(asdict(facts)))["outliers"] == list(facts.outliers)
    for scores in facts.mlp:
        assert sum(scores) == pytest.approx(0, abs=1e-9)
        assert (list(scores) == sorted(scores, reverse=True)) == (metric == "wifv")


def test_facts_of_a_model_are_those_of_its_layers() -> None:
    layers = [LayerFacts(1.0, (0.5,), (2.0, 1.0)), LayerFacts(3.0, (0.1,), (4.0, 0.0))]
    expected = AllocationFacts((1.0, 3.0), ((0.5,), (0.1,)), ((2.0, 1.0), (4.0, 0.0)))
    assert AllocationFacts.of(layers) == expected
