"""Fitness and predicted speed on tiny random models, against sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from evaluators.choices import EncodedChoices, _MicroBatch
from pruning.elastic import ElasticModel, Recipe
from pruning.elastic_layer import ElasticLayer, LayerParameters
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.families import family_of
from pruning.plan import Grid, LayerPlan, Plan
from pruning.slicing import sliced
from pruning.spool import Spool
from selfpruner.fitness import Finished, Fitness
from selfpruner.latency_table import LatencyTable, Workload

DENSE = Plan.from_json([[2, 2, 48]] * 2)
# The first two and the last share a prefix: the trie meets them in another order than given.
PLANS = [Plan.from_json(x) for x in ([[1, 2, 16], [2, 2, 8]], [[2, 2, 48], [1, 2, 16]])]
GRID = Grid("kv_group", (1, 2), (8, 16, 24, 32, 40, 48), DENSE.layers[0])
PLANS += [DENSE, Plan.from_json([[1, 2, 16], [1, 2, 48]]), PLANS[0]]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, 120, shape, generator=torch.Generator().manual_seed(seed))


TOKENS = _random(5, 12, seed=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only slow models of this size down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def elastic() -> ElasticModel:
    return _ranked()


def _ranked(quiet: float = 1.0, dtype: torch.dtype = torch.float64) -> ElasticModel:
    """A ranked random model; `quiet` scales what its second MLP writes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    family, architecture = family_of(model)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(quiet)
    recipe = Recipe("wanda_sp", "least_squares", 0.01)
    return ElasticModel.rank(model, family, architecture, _random(12, 16, seed=2), recipe)


def _fitness(elastic: ElasticModel, weights: dict[str, float], **options: Any) -> Fitness:
    model: Any = elastic.model
    return Fitness(elastic, model, elastic.family, weights, TOKENS, **({"batch_size": 2} | options))


def _log_probabilities(elastic: ElasticModel, plan: Plan, sequence: int) -> Tensor:
    """Of the sliced model, at the positions that predict a token (T - 1, V)."""
    logits = sliced(elastic, plan)(TOKENS[sequence : sequence + 1]).logits
    return logits[0, :-1].detach().log_softmax(-1)


def _kl(elastic: ElasticModel, plan: Plan, sequence: int) -> float:
    log_p = _log_probabilities(elastic, DENSE, sequence)
    log_q = _log_probabilities(elastic, plan, sequence)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _cross_entropy(elastic: ElasticModel, plan: Plan, sequence: int) -> float:
    log_q = _log_probabilities(elastic, plan, sequence)
    targets = TOKENS[sequence, 1:].tolist()
    return -sum(float(log_q[t, token]) for t, token in enumerate(targets)) / len(targets)


@pytest.mark.parametrize(("name", "oracle"), [("kl", _kl), ("perplexity", _cross_entropy)])
def test_text_terms_by_hand(elastic: ElasticModel, name: str, oracle: Any) -> None:
    sequences = [4, 0, 3]
    found = _fitness(elastic, {name: 1.0})(PLANS, sequences)
    expected = [[oracle(elastic, plan, s) for s in sequences] for plan in PLANS]
    assert found.shape == (5, 3)
    assert found.dtype == np.float64
    assert np.allclose(found, expected, rtol=0, atol=1e-6)


def test_the_dense_plan_does_not_diverge(elastic: ElasticModel) -> None:
    """Lower is better: the dense plan is at 0 and every other above."""
    scores = _fitness(elastic, {"kl": 1.0})(PLANS, range(5))
    assert np.abs(scores[2]).max() < 1e-7
    assert scores[[0, 1, 3, 4]].min() > 1e-3


def test_top512_covers_this_vocabulary(elastic: ElasticModel) -> None:
    full, top = (_fitness(elastic, {name: 1.0})(PLANS, range(5)) for name in ("kl", "kl_top512"))
    assert np.allclose(full, top, rtol=0, atol=1e-9)


def _noted(monkeypatch: pytest.MonkeyPatch, elastic: ElasticModel) -> list[tuple[int, int]]:
    """Return a list that tells from now on which MLP cuts are made: layers and widths."""
    made: list[tuple[int, int]] = []
    original = ElasticLayer.mlp_output

    def note(layer: ElasticLayer, plan: LayerPlan) -> LayerParameters:
        made.append((elastic.layers.index(layer), plan.mlp_channels))
        return original(layer, plan)

    monkeypatch.setattr(ElasticLayer, "mlp_output", note)
    return made


def test_plans_that_no_cache_holds_make_each_cut_once(
    elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ElasticModel(elastic.model, elastic.family, elastic.layers, cache_bytes=2**10)
    expected = _fitness(elastic, {"kl": 1.0})(PLANS, range(5))
    made = _noted(monkeypatch, elastic)
    found = _fitness(LayerwiseElastic(small, 2), {"kl": 1.0})(PLANS, range(5))
    assert np.array_equal(found, expected)
    assert len(made) == len(set(made)) == 5
    made.clear()
    _fitness(small, {"kl": 1.0})(PLANS, range(5))
    assert len(made) > 5


def test_order_of_plans_and_sequences_does_not_matter(elastic: ElasticModel) -> None:
    fitness = _fitness(elastic, {"kl": 1.0})
    scores = fitness(PLANS, [0, 1, 2, 3, 4])
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        again = fitness([PLANS[i] for i in order], [4, 2, 0])
        assert np.allclose(again, scores[order][:, [4, 2, 0]], rtol=0, atol=1e-9)
    assert np.array_equal(scores[0], scores[4])
    for row, plan in enumerate(PLANS):
        assert np.allclose(fitness([plan], [3]), scores[row, 3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_does_not_matter(elastic: ElasticModel, batch_size: int) -> None:
    weights = {"kl": 1.0, "perplexity": 0.5}
    scores = _fitness(elastic, weights)(PLANS, range(5))
    again = _fitness(elastic, weights, batch_size=batch_size)(PLANS, range(5))
    assert np.allclose(again, scores, rtol=0, atol=1e-7)


def test_terms_are_weighted_and_summed(elastic: ElasticModel) -> None:
    kl = _fitness(elastic, {"kl": 1.0})(PLANS, range(5))
    loss = _fitness(elastic, {"perplexity": 1.0})(PLANS, range(5))
    both = _fitness(elastic, {"kl": 2.0, "perplexity": 0.25, "accuracy": 0.0})(PLANS, range(5))
    assert np.allclose(both, 2 * kl + 0.25 * loss, rtol=0, atol=1e-9)


def test_finished_models_are_scored_as_plans_are(elastic: ElasticModel) -> None:
    fitness = _fitness(elastic, {"kl": 1.0, "perplexity": 0.5})
    assert fitness.num_sequences == 5
    expected = fitness(PLANS[:1], range(5))
    finished = fitness.of(Finished(sliced(elastic, PLANS[0]), elastic.family, 2))
    found = finished([PLANS[0], DENSE], range(5))
    assert np.allclose(found[0], expected[0], rtol=0, atol=1e-7)
    assert np.array_equal(found[0], found[1])
    assert finished.num_sequences == 5


def _choices() -> EncodedChoices:
    """Two items of two choices, one token each after [5, 6] and [7, 8, 9]: four rows, one batch."""
    ids = torch.tensor([[5, 6, 20, 0], [5, 6, 21, 0], [7, 8, 9, 22], [7, 8, 9, 23]])
    batch = _MicroBatch(
        ids,
        torch.arange(4),
        torch.tensor([1, 1, 2, 2]),
        torch.tensor([20, 21, 22, 23]),
        torch.arange(4),
    )
    characters, items = np.array([4.0, 4.0, 2.0, 2.0]), np.array([0, 0, 1, 1])
    return EncodedChoices((batch,), characters, items, np.array([0, 1]))


def _rows(start: int, stop: int, length: int) -> _MicroBatch:
    """Return some rows of `_choices` as a micro-batch of their own, without needless padding."""
    (whole,) = _choices().batches
    return _MicroBatch(
        whole.ids[start:stop, :length],
        torch.arange(stop - start),
        whole.position[start:stop],
        whole.target[start:stop],
        whole.rows[start:stop],
    )


def _margins(elastic: ElasticModel, plan: Plan) -> list[float]:
    """(log q(right) - log q(wrong)) / characters: the log-sum-exp cancels."""
    model = sliced(elastic, plan)
    first = model(torch.tensor([[5, 6]])).logits[0, -1].detach()
    second = model(torch.tensor([[7, 8, 9]])).logits[0, -1].detach()
    return [float(first[20] - first[21]) / 4, float(second[23] - second[22]) / 2]


def test_accuracy_term_by_hand(elastic: ElasticModel) -> None:
    fitness = _fitness(elastic, {"accuracy": 3.0}, choices=_choices())
    scores = fitness(PLANS, [0, 1])
    for row, plan in enumerate(PLANS):
        margins = _margins(elastic, plan)
        assert scores[row].tolist() == pytest.approx([-3 * sum(margins) / 2] * 2, abs=1e-6)
        assert fitness.accuracy(plan) == sum(margin > 0 for margin in margins) / 2


def test_items_of_plans_that_no_cache_holds_take_each_cut_once(
    elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _noted(monkeypatch, elastic)
    small = ElasticModel(elastic.model, elastic.family, elastic.layers, cache_bytes=2**10)
    choices = replace(_choices(), batches=(_rows(0, 2, 3), _rows(2, 4, 4)))
    whole, layerwise = (
        _fitness(runs, {"accuracy": 1.0}, choices=choices)(PLANS[:1], [0])
        for runs in (small, LayerwiseElastic(small, 2))
    )
    assert np.array_equal(whole, layerwise)
    made.clear()
    _fitness(LayerwiseElastic(small, 2), {"accuracy": 1.0}, choices=choices)(PLANS[:1], [0])
    assert len(made) == len(set(made)) > 1


def test_accuracy_without_items_is_refused(elastic: ElasticModel) -> None:
    with pytest.raises(ValueError, match=r"^data\.choices: got 0, want at least 1 for .*$"):
        _fitness(elastic, {"kl": 1.0}).accuracy(DENSE)


def test_latency_term_is_the_share_of_the_dense_time(elastic: ElasticModel) -> None:
    """Base 10, a group of two heads 2, a channel 0.5: 66 dense, 10 + 6 + 12 = 28 for the first."""
    speed = _speed()
    dense = speed.milliseconds(DENSE)
    fitness = _fitness(elastic, {"kl": 1.0, "latency": 2.0}, speed=speed)
    plain = _fitness(elastic, {"kl": 1.0})(PLANS, [0, 1])
    extra = fitness(PLANS, [0, 1]) - plain
    for row, plan in enumerate(PLANS):
        groups = sum(x.kv_groups for x in plan.layers)
        channels = sum(x.mlp_channels for x in plan.layers)
        by_hand = 10 + 2 * groups + channels / 2
        assert speed.milliseconds(plan) == pytest.approx(by_hand)
        assert np.allclose(extra[row], 2 * by_hand / dense)


@pytest.mark.parametrize("weights", [{"kl": 1.0}, {"perplexity": 0.5}, {"kl_top512": 2.0}])
def test_slopes_foretell_the_fitness_where_little_changes(weights: dict[str, float]) -> None:
    """The second MLP writes next to nothing: what its widths do is a matter of first order."""
    elastic, sequences = _ranked(quiet=1e-3), [4, 0, 3]
    fitness, plan = _fitness(elastic, weights), PLANS[0]
    (_, found) = fitness.slopes(plan, GRID, sequences)[1]
    others = [Plan((plan.layers[0], LayerPlan(2, 2, width))) for width in GRID.mlp]
    scores = fitness([plan, *others], sequences).mean(1)
    changes = scores[1:] - scores[0]
    assert np.abs(changes).max() > 1e-6
    assert np.allclose(found, changes, rtol=0.02, atol=0.01 * np.abs(changes).max())


def test_slopes_are_weighted_and_summed(elastic: ElasticModel) -> None:
    weights = {"kl": 1.0, "perplexity": 0.5}
    both = _fitness(elastic, weights).slopes(PLANS[0], GRID, [1, 2])
    each = [_fitness(elastic, {k: w}).slopes(PLANS[0], GRID, [1, 2]) for k, w in weights.items()]
    for whole, *parts in zip(both, *each, strict=True):
        for curve, *terms in zip(whole, *parts, strict=True):
            assert np.allclose(curve, np.sum(terms, axis=0), rtol=1e-6, atol=1e-9)


def test_gradients_in_float16_do_not_come_to_nothing() -> None:
    elastic = _ranked(dtype=torch.float16)
    large, small = (_fitness(elastic, {"kl": x}).slopes(PLANS[0], GRID, [1, 2]) for x in (1, 1e-4))
    for curves, scaled in zip(large, small, strict=True):
        for curve, values in zip(curves, scaled, strict=True):
            assert np.abs(curve).max() > 0
            assert np.allclose(curve, 1e4 * np.array(values), atol=0.02 * np.abs(curve).max())


def test_slopes_know_what_levels_add_to_the_time(elastic: ElasticModel) -> None:
    speed = _speed()
    timed = _fitness(elastic, {"kl": 1.0, "latency": 2.0}, speed=speed)
    plain = _fitness(elastic, {"kl": 1.0}).slopes(PLANS[0], GRID, [1])
    found = timed.slopes(PLANS[0], GRID, [1])
    dense = speed.milliseconds(DENSE)
    for layer, kept in enumerate(PLANS[0].layers):
        attention, mlp = np.subtract(found[layer][0], plain[layer][0]), found[layer][1]
        assert np.allclose(attention, [2 * 2 * (g - kept.kv_groups) / dense for g in (1, 2)])
        extra = np.subtract(mlp, plain[layer][1])
        assert np.allclose(extra, [2 * (w - kept.mlp_channels) / 2 / dense for w in GRID.mlp])


def test_slopes_are_there_for_text_and_for_many_plans(elastic: ElasticModel) -> None:
    fitness = _fitness(elastic, {"kl": 1.0})
    assert fitness.has_slopes
    assert not _fitness(elastic, {"latency": 1.0}, speed=_speed()).has_slopes
    model: Any = elastic.model
    assert not fitness.of(Finished(model, elastic.family, 2)).has_slopes


def test_streamed_slopes_are_the_same(elastic: ElasticModel, tmp_path: Path) -> None:
    fitness = _fitness(elastic, {"kl": 1.0})
    spooled = fitness.slopes(PLANS[1], GRID, [0, 3, 2], Spool(tmp_path))
    assert spooled == fitness.slopes(PLANS[1], GRID, [0, 3, 2])
    assert len(list(tmp_path.iterdir())) == 2  # the inputs of both layers
    layerwise: Any = LayerwiseElastic(elastic, 2)
    again = Fitness(layerwise, layerwise.model, elastic.family, {"kl": 1.0}, TOKENS, batch_size=2)
    assert again.slopes(PLANS[1], GRID, [0, 3, 2]) == spooled


def _speed() -> LatencyTable:
    return LatencyTable(
        Workload("prefill", 1, 16),
        "kv_group",
        DENSE.layers[0],
        2,
        10.0,
        ((1, 2.0), (DENSE.layers[0].kv_groups, 2.0 * DENSE.layers[0].kv_groups)),
        ((8, 4.0), (DENSE.layers[0].mlp_channels, DENSE.layers[0].mlp_channels / 2)),
    )
