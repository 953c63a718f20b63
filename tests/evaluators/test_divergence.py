"""Divergences against textbook sums over the vocabulary in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evaluators import divergence
from evaluators.divergence import (
    DenseReference,
    TopReference,
    log_partition,
    negative_log_likelihood,
)

POSITIONS, HIDDEN, VOCABULARY = 23, 8, 50


def _case(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Dense and pruned hidden states (N, D) and a head (V, D) far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    pruned = dense + 0.3 * torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    return dense.to(dtype), pruned.to(dtype), head.to(dtype)


def _probabilities(hidden_D: Tensor, head_VD: Tensor) -> list[float]:
    weights = [math.exp(float(row @ hidden_D)) for row in head_VD.double()]
    return [w / sum(weights) for w in weights]


def _textbook(dense_ND: Tensor, pruned_ND: Tensor, head_VD: Tensor) -> list[float]:
    result = []
    for dense, pruned in zip(dense_ND.double(), pruned_ND.double(), strict=True):
        p, q = _probabilities(dense, head_VD), _probabilities(pruned, head_VD)
        result.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return result


def _textbook_top(dense_ND: Tensor, pruned_ND: Tensor, head_VD: Tensor, k: int) -> list[float]:
    result = []
    for dense, pruned in zip(dense_ND.double(), pruned_ND.double(), strict=True):
        p, q = _probabilities(dense, head_VD), _probabilities(pruned, head_VD)
        top = sorted(range(len(p)), key=lambda v: -p[v])[:k]
        pairs = [(p[v], q[v]) for v in top]
        pairs.append((1 - sum(p[v] for v in top), 1 - sum(q[v] for v in top)))
        result.append(sum(a * math.log(a / b) for a, b in pairs))
    return result


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions come in several chunks, the last one short."""
    monkeypatch.setattr(divergence, "CHUNK", 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kl_is_the_textbook_sum(dtype: torch.dtype, tolerance: float) -> None:
    dense, pruned, head = _case(dtype)
    found = DenseReference(dense, head).kl(pruned)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(_textbook(dense, pruned, head), abs=tolerance)


def test_kl_in_half_precision_is_close() -> None:
    """The oracle sees the rounded inputs; products are rounded to 8 bits on the way."""
    dense, pruned, head = _case(torch.bfloat16)
    found = DenseReference(dense, head).kl(pruned)
    assert found.dtype == torch.float32
    expected = _textbook(dense, pruned, head)
    assert float(found.mean()) == pytest.approx(sum(expected) / len(expected), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_models_do_not_diverge(dtype: torch.dtype) -> None:
    dense, _, head = _case(dtype)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert float(DenseReference(dense, head).kl(dense).abs().max()) < limit
    assert float(TopReference(dense, head, 7).kl(dense).abs().max()) < limit


def test_direction_is_from_the_dense_model() -> None:
    dense, pruned, head = _case()
    forwards, backwards = (
        DenseReference(dense, head).kl(pruned),
        DenseReference(pruned, head).kl(dense),
    )
    assert not torch.allclose(forwards, backwards, rtol=1e-3)
    assert bool((forwards > 0).all())
    assert forwards.tolist() == pytest.approx(_textbook(dense, pruned, head))


def test_a_certain_model_pays_the_log_probability() -> None:
    """One vocabulary entry takes all of p: the divergence is -log q of it, here log 2."""
    head = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    certain, undecided = (torch.tensor([[x]], dtype=torch.float64) for x in (800.0, 0.0))
    assert float(DenseReference(certain, head).kl(undecided)) == pytest.approx(math.log(2))
    assert float(TopReference(certain, head, 1).kl(undecided)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_top_is_the_textbook_sum(k: int) -> None:
    dense, pruned, head = _case()
    found = TopReference(dense, head, k).kl(pruned)
    expected = _textbook_top(dense, pruned, head, k)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_top_is_a_lower_bound_that_rises_to_kl(seed: int) -> None:
    dense, pruned, head = _case(seed=seed)
    full = DenseReference(dense, head).kl(pruned)
    means = []
    for k in (1, 5, 20, 48):
        found = TopReference(dense, head, k).kl(pruned)
        assert bool((found <= full + 1e-12).all())
        assert bool((found >= -1e-12).all())
        means.append(float(found.mean()))
    assert means == sorted(means)
    assert means[-1] < float(full.mean())
    for k in (VOCABULARY - 1, VOCABULARY, 512):
        assert torch.allclose(TopReference(dense, head, k).kl(pruned), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_negative_log_likelihood(dtype: torch.dtype, tolerance: float) -> None:
    dense, _, head = _case(dtype)
    targets = torch.arange(POSITIONS) % VOCABULARY
    found = negative_log_likelihood(dense, head, targets)
    expected = [
        -math.log(_probabilities(hidden.double(), head)[int(target)])
        for hidden, target in zip(dense, targets, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


def test_uniform_predictions_cost_log_vocabulary() -> None:
    _, _, head = _case()
    hidden = torch.zeros(4, HIDDEN, dtype=torch.float64)
    assert log_partition(hidden, head).tolist() == pytest.approx([math.log(VOCABULARY)] * 4)
    losses = negative_log_likelihood(hidden, head, torch.tensor([0, 1, 2, 3]))
    assert losses.tolist() == pytest.approx([math.log(VOCABULARY)] * 4)


def test_large_logits_do_not_overflow() -> None:
    dense, pruned, head = _case(torch.float32)
    reference = DenseReference(1000 * dense, head)
    assert bool(reference.kl(1000 * pruned).isfinite().all())
    assert bool((reference.kl(1000 * dense).abs() < 1e-1).all())


@pytest.mark.parametrize("level", [-300.0, -60.0, 0.0, 60.0, 300.0])
def test_the_level_of_logits_is_added(level: float) -> None:
    _, hidden, head = _case(torch.float32)
    ones = torch.ones(VOCABULARY, 1)
    levels = torch.full((POSITIONS, 1), level)
    found = log_partition(torch.cat([hidden, levels], 1), torch.cat([head, ones], 1))
    assert torch.allclose(found, log_partition(hidden, head) + level, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["CHUNK", "VOCABULARY"])
@pytest.mark.parametrize("size", [1, 4, 23, 1000])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    dense, pruned, head = _case()
    targets = torch.arange(POSITIONS)

    def everything() -> list[Tensor]:
        return [
            DenseReference(dense, head).kl(pruned),
            TopReference(dense, head, 9).kl(pruned),
            negative_log_likelihood(pruned, head, targets),
        ]

    before = everything()
    monkeypatch.setattr(divergence, name, size)
    for one, other in zip(everything(), before, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_a_vocabulary_of_several_parts_is_summed_over_all_of_them() -> None:
    """The loops over the vocabulary run as often as for a real model, without a patch."""
    size = 2 * divergence.VOCABULARY + 5
    head = torch.randn(size, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    logits = hidden.double() @ head.double().T
    assert torch.allclose(log_partition(hidden, head).double(), logits.logsumexp(-1), rtol=1e-5)


def test_512_tokens_are_listed_where_nobody_says_how_many() -> None:
    dense, pruned, _ = _case()
    head = torch.randn(600, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    found = TopReference(dense, head).kl(pruned)
    assert torch.equal(found, TopReference(dense, head, 512).kl(pruned))
    assert not torch.equal(found, TopReference(dense, head, 511).kl(pruned))


def test_positions_are_independent() -> None:
    dense, pruned, head = _case()
    whole = DenseReference(dense, head).kl(pruned)
    alone = [DenseReference(dense[i : i + 1], head).kl(pruned[i : i + 1]) for i in range(POSITIONS)]
    assert torch.allclose(whole, torch.cat(alone), rtol=0, atol=1e-12)


def test_references_serve_many_candidates() -> None:
    """A reference is not used up, and asks for no gradient."""
    dense, pruned, head = _case()
    for reference in (DenseReference(dense, head), TopReference(dense, head, 9)):
        first = reference.kl(pruned)
        reference.kl(dense)
        assert torch.equal(reference.kl(pruned), first)
        assert not first.requires_grad
