"""Memory: bytes and counts of weights, and the peak of the process."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the parameters occupy; a storage shared by several (tied weights) counts once."""
    storages = {
        (str(parameter.device), storage.data_ptr()): storage.nbytes()
        for parameter in model.parameters()
        if (storage := parameter.untyped_storage()).nbytes()
    }
    return sum(storages.values())


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; the same weights under two names (tied weights) count once."""
    unique = {
        (str(parameter.device), parameter.data_ptr(), tuple(parameter.shape)): parameter.numel()
        for parameter in model.parameters()
    }
    return sum(unique.values())


@torch.inference_mode()
def cached_bytes(model: nn.Module) -> int:
    """Return the bytes that one token of one sequence takes in the KV cache of all layers."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache: Any = model(input_ids=ids, use_cache=True).past_key_values
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)


def step_bytes(model: nn.Module, batch: int, context: int) -> int:
    """Return the bytes that one decode step has to read: weights and KV cache.

    `batch` sequences of `context` tokens each. Of an embedding that is not tied to the head a
    step reads a few rows, which do not count.
    """
    weights = weight_bytes(model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        weights -= embedding.weight.nbytes
    return weights + batch * context * cached_bytes(model)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The system reports bytes on macOS and KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024
