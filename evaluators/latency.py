"""Latency of models side by side: prefill and decode, interleaved so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PHASES = ("prefill", "decode")


def compare_latency(
    models: Mapping[str, nn.Module],
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row per phase: prefill, then decode.

    Prefill is one forward over the prompt that fills the KV cache and makes the last position's
    logits; decode is one greedy step with that cache. Models take turns within each repeat, in
    an order that is reversed from one repeat to the next.

    Args:
        models: One model, or a baseline and then a second one, by name.
        batch: Sequences side by side.
        prompt_tokens: Tokens a prompt (random ids).
        new_tokens: Greedy steps timed together.
        repeats: Timed repeats.
        warmup: Untimed repeats before them.
        seed: Seed of the prompts.

    Returns:
        Rows `{phase, batch, tokens, <name>_ms...}`, `tokens` being those of the prompt, times in
        milliseconds: medians, of the whole prefill and of ONE decode step after it. With two
        models also `speedup`, first over second, and `spread`, the interquartile range of the
        ratio over repeats.
    """
    if not models or len(models) > 2 or min(batch, prompt_tokens, new_tokens, repeats) < 1:
        raise ValueError(
            f"latency: got {len(models)} models, batch {batch}, prompt_tokens {prompt_tokens}, "
            f"new_tokens {new_tokens}, repeats {repeats}; allowed 1 or 2 models, the rest >= 1"
        )
    vocabulary = min(_vocabulary(model) for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator)
    times = _interleaved_times(models, prompt, new_tokens, repeats, warmup)
    return [
        {"phase": phase, "batch": batch, "tokens": prompt_tokens}
        | _summary(list(models), seconds_MR)
        for phase, seconds_MR in zip(PHASES, times, strict=True)
    ]


def _interleaved_times(
    models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int, repeats: int, warmup: int
) -> NDArray[np.float64]:
    """Seconds, shape (phases, models, repeats)."""
    times = np.zeros((len(PHASES), len(models), repeats))
    order = list(enumerate(models.values()))
    for repeat in range(-warmup, repeats):
        for index, model in order:
            measured = one_repeat(model, prompt, new_tokens)
            if repeat >= 0:
                times[:, index, repeat] = measured
        order.reverse()
    return times


@torch.inference_mode()
def one_repeat(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill, and of one decode step averaged over `new_tokens` steps.

    `prompt` has shape (batch, tokens); `compare_latency` says what either phase is.
    """
    device = next(model.parameters()).device
    ids = prompt.to(device)
    start = clock(device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    filled = clock(device)
    for _ in range(new_tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
    return filled - start, (clock(device) - filled) / new_tokens


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _summary(names: list[str], seconds_MR: NDArray[np.float64]) -> dict[str, Any]:
    medians = 1000 * np.median(seconds_MR, axis=1)
    row: dict[str, Any] = {f"{name}_ms": float(ms) for name, ms in zip(names, medians, strict=True)}
    if len(names) == 2:
        low, high = np.percentile(seconds_MR[0] / seconds_MR[1], [25, 75])
        row |= {"speedup": float(medians[0] / medians[1]), "spread": float(high - low)}
    return row


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
