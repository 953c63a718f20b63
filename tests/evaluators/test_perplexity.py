from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

import evaluators.perplexity
from evaluators.perplexity import perplexity_of, window_losses

Factory = Callable[..., LlamaForCausalLM]
IDS = torch.randint(3, 128, (45,), generator=torch.Generator().manual_seed(1))
WINDOWS = IDS[:44].view(4, 11)


def _hand_losses(model: torch.nn.Module, windows_NL: torch.Tensor) -> list[float]:
    """Token by token in float64, one window at a time."""
    losses = []
    for window in windows_NL:
        logits = model(input_ids=window[None]).logits[0]
        terms = [
            math.log(sum(math.exp(v) for v in logits[t].tolist())) - logits[t, window[t + 1]].item()
            for t in range(len(window) - 1)
        ]
        losses.append(sum(terms) / len(terms))
    return losses


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("entries", [1, 1000, 2**24])
def test_equals_a_hand_loop(
    tiny_llama: Factory, batch_size: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluators.perplexity, "_LOGIT_ENTRIES", entries)
    model = tiny_llama().double()
    with torch.no_grad():
        expected = _hand_losses(model, WINDOWS)
    assert window_losses(model, WINDOWS, batch_size).tolist() == pytest.approx(expected, 1e-12)

    metric = perplexity_of(window_losses(model, WINDOWS, batch_size))
    mean = sum(expected) / 4
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in expected) / 3)
    assert metric.value == pytest.approx(math.exp(mean), rel=1e-12)
    assert metric.stderr == pytest.approx(math.exp(mean) * spread / math.sqrt(4), rel=1e-10)
    assert (metric.n, metric.higher_is_better) == (4, False)


def test_stderr_matches_the_spread_of_repeated_samples(tiny_llama: Factory) -> None:
    model = tiny_llama(seed=3)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 128, (100 * 20, 12), generator=generator)
    results = [perplexity_of(window_losses(model, chunk, batch_size=20)) for chunk in ids.split(20)]
    values = torch.tensor([result.value for result in results])
    claimed = torch.tensor([result.stderr or math.nan for result in results]).mean()
    assert float(claimed / values.std()) == pytest.approx(1.0, abs=0.25)


def test_one_window_has_no_standard_error(tiny_llama: Factory) -> None:
    assert perplexity_of(window_losses(tiny_llama(), IDS[None])).stderr is None


def test_low_precision_logits_are_widened(tiny_llama: Factory) -> None:
    model = tiny_llama().to(torch.bfloat16)
    losses = window_losses(model, WINDOWS)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS).logits.double()
    picked = logits.log_softmax(-1)[:, :-1].gather(2, WINDOWS[:, 1:, None])[..., 0]
    assert losses.tolist() == pytest.approx((-picked.mean(dim=1)).tolist(), rel=1e-5)


def test_a_loss_too_large_for_a_perplexity() -> None:
    assert perplexity_of(torch.tensor([700.0, 800.0], dtype=torch.float64)).value == math.inf


def test_training_mode_is_restored(tiny_llama: Factory) -> None:
    model = tiny_llama().train()
    window_losses(model, WINDOWS)
    assert model.training
