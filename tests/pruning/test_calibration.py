"""Calibration that grows: which tokens each pass takes, when it stops, what is merged."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.calibration import Calibration, grown_calibration
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.families import family_of
from pruning.output_projection import output_projections
from pruning.ranking import order_hash
from pruning.reconstruction.ridge import held_out_errors
from pruning.statistics import stream_statistics


def _grown(model: Any, tokens: Tensor, enough: float, batch_size: int = 1) -> Calibration:
    family, architecture = family_of(model)
    return grown_calibration(
        model, family, architecture, tokens, "kv_group", batch_size=batch_size, enough=enough
    )


def test_passes_double_what_is_not_held_out(make_model: Any, make_tokens: Any) -> None:
    """64 sequences of 8: eight are held out; 7, 14, 28 and 56 are fitted to."""
    found = _grown(make_model("llama"), make_tokens(64, 8), enough=-math.inf)
    assert found.tokens == (8 * 15, 8 * 22, 8 * 36, 8 * 64)
    assert len(found.errors) == 4


def test_all_tokens_give_the_statistics_of_one_pass(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("qwen3"), make_tokens(19, 8)
    found = _grown(model, tokens, enough=-math.inf).statistics
    whole = stream_statistics(model, family_of(model)[0], tokens, 1, hold_out=True)
    for one, other in zip(found, whole, strict=True):
        pairs = [(one.attention, other.attention), (one.mlp, other.mlp)]
        for a, b in pairs + [(x.held_out, y.held_out) for x, y in pairs]:
            assert a is not None
            assert b is not None
            assert a.count == b.count
            assert a.residual_energy == b.residual_energy
            for name in ("mean", "square", "gram"):
                assert torch.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-12)
        for x, y in zip(one.entry_squares, other.entry_squares, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-12)


def test_a_pass_without_enough_gain_is_the_last(make_model: Any, make_tokens: Any) -> None:
    """The gains of all doublings are known; a threshold above the first, then between."""
    model, tokens = make_model("llama"), make_tokens(64, 8)
    errors = _grown(model, tokens, enough=-math.inf).errors
    gains = [1 - late / early for early, late in pairwise(errors)]
    for enough in (0.99, max(gains) + 1e-6, max(gains) - 1e-6, min(gains) - 1e-6):
        stops = [index for index, gain in enumerate(gains) if gain < enough]
        passes = stops[0] + 2 if stops else 4
        found = _grown(model, tokens, enough)
        assert found.errors == errors[:passes]
    assert _grown(model, tokens, 0.99).tokens == (8 * 15, 8 * 22)


def test_errors_are_those_of_the_probed_layers(make_model: Any, make_tokens: Any) -> None:
    """Layers 0 and 4 of six, both blocks, each at its best ridge; the geometric mean."""
    model, tokens = make_model("llama", num_hidden_layers=6), make_tokens(16, 8)
    found = _grown(model, tokens, enough=-math.inf)
    family, architecture = family_of(model)
    best = []
    for index in (0, 4):
        parameters = dict(family.layers(model)[index].named_parameters())
        statistics = found.statistics[index]
        for x in output_projections(parameters, family, architecture, "kv_group", statistics):
            best.append(min(held_out_errors(x).values()))
    assert found.errors[-1] == pytest.approx(math.prod(best) ** (1 / 4))


def test_the_elastic_model_is_that_of_one_pass(make_model: Any, make_tokens: Any) -> None:
    model, tokens = make_model("llama"), make_tokens(24, 16)
    family, architecture = family_of(model)
    recipe = Recipe("obs", "least_squares", "auto")
    grown = _grown(model, tokens, -math.inf, batch_size=2).statistics
    found = ElasticModel.of(model, family, architecture, grown, recipe)
    once = ElasticModel.rank(model, family, architecture, tokens, recipe, batch_size=2)
    assert [x.ridges for x in found.layers] == [x.ridges for x in once.layers]
    names = [order_hash([layer.order for layer in x.layers]) for x in (found, once)]
    assert names[0] == names[1]


def test_a_single_batch_is_all_there_is(make_model: Any, make_tokens: Any) -> None:
    found = _grown(make_model("llama"), make_tokens(4, 8), enough=0.01, batch_size=8)
    assert found.tokens == (32,)
    assert found.statistics[0].mlp.held_out is None
