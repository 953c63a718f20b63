from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import evaluators.latency
from evaluators.latency import compare_latency

Factory = Callable[..., LlamaForCausalLM]
SIZES = {"batch": 2, "prompt_tokens": 7, "new_tokens": 3, "repeats": 4, "warmup": 1, "seed": 0}


class Recorder(nn.Module):
    """Passes calls on, writes them down, and moves a clock of its own."""

    def __init__(self, name: str, model: nn.Module, log: list[tuple[str, int]], cost: Any) -> None:
        super().__init__()
        self.model, self.name, self.log, self.cost = model, name, log, cost

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
        self.log.append((self.name, input_ids.shape[1]))
        self.cost(input_ids.shape[1])
        return self.model(input_ids=input_ids, **keywords)


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(evaluators.latency.time, "perf_counter", lambda: now[0])
    return now


def _spend(clock: list[float], prefill: Any, step: float) -> Any:
    def cost(tokens: int) -> None:
        clock[0] += next(prefill) if tokens > 1 else step

    return cost


def test_medians_ratio_and_spread_on_a_known_clock(tiny_llama: Factory, clock: list[float]) -> None:
    log: list[tuple[str, int]] = []
    # The first prefill is the warm-up and must not count.
    dense = _spend(clock, iter([99.0, 4.0, 4.0, 8.0, 8.0]), 0.5)
    pruned = _spend(clock, iter([99.0, 2.0, 2.0, 2.0, 2.0]), 0.25)
    models = {
        "dense": Recorder("dense", tiny_llama(0), log, dense),
        "pruned": Recorder("pruned", tiny_llama(1, mlp=8), log, pruned),
    }
    prefill, decode = compare_latency(models, **SIZES)
    assert prefill == {
        "phase": "prefill", "batch": 2, "tokens": 7,
        "dense_ms": 6000.0, "pruned_ms": 2000.0, "speedup": 3.0, "spread": 2.0,
    }  # fmt: skip
    assert decode == {
        "phase": "decode", "batch": 2, "tokens": 7,
        "dense_ms": 500.0, "pruned_ms": 250.0, "speedup": 2.0, "spread": 0.0,
    }  # fmt: skip
    # Each turn is one prompt and three single tokens; turns alternate: d p | p d | d p | ...
    turns = [name for name, tokens in log if tokens == 7]
    assert turns == ["dense", "pruned", "pruned", "dense"] * 2 + ["dense", "pruned"]
    assert [tokens for _, tokens in log] == [7, 1, 1, 1] * 10


def test_decode_continues_from_the_prompt(tiny_llama: Factory) -> None:
    """The cached greedy steps see the same tokens as full forwards over the growing text."""
    seen: list[torch.Tensor] = []

    class Watcher(Recorder):
        def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
            seen.append(input_ids)
            return super().forward(input_ids, **keywords)

    model = tiny_llama(4)
    sizes = SIZES | {"repeats": 1, "warmup": 0}
    compare_latency({"only": Watcher("only", model, [], lambda _: None)}, **sizes)
    text = torch.cat(seen, dim=1)
    for length in (7, 8, 9):
        expected = model(input_ids=text[:, :length]).logits[:, -1].argmax(-1)
        assert text[:, length].tolist() == expected.tolist()


def test_one_model_has_no_ratio(tiny_llama: Factory) -> None:
    rows = compare_latency({"dense": tiny_llama()}, **SIZES)
    assert [set(row) for row in rows] == [{"phase", "batch", "tokens", "dense_ms"}] * 2
    assert all(row["dense_ms"] > 0 for row in rows)


@pytest.mark.parametrize("change", [{"repeats": 0}, {"batch": 0}, {"new_tokens": 0}])
def test_sizes_are_checked(tiny_llama: Factory, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed 1 or 2 models"):
        compare_latency({"dense": tiny_llama()}, **(SIZES | change))


def test_three_models_are_refused(tiny_llama: Factory) -> None:
    models = dict(zip("abc", itertools.repeat(tiny_llama()), strict=False))
    with pytest.raises(ValueError, match="got 3 models"):
        compare_latency(models, **SIZES)
