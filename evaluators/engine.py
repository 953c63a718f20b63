"""An engine with a model, as a worker asks it, and what all engines need."""

from __future__ import annotations

import importlib.metadata
import random
from typing import Any, Protocol

Load = dict[str, Any]
Seconds = dict[str, float]

# Share of the free memory that a cache may take; activations need some as well.
_USABLE = 0.8


class SkipError(Exception):
    """A combination of batch and length does not fit, and why."""


class Engine(Protocol):
    """A loaded model. `facts` says what its times depend on."""

    def facts(self) -> dict[str, Any]:
        """Return version, dtype, threads, context in tokens, and how the engine runs."""
        ...

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds, decode being one step.

        Raises:
            SkipError: it does not fit.
        """
        ...

    def device_bytes(self) -> int | None:
        """Return the peak of what was taken of the device's own memory; None if nobody knows."""
        ...


def random_prompts(batch: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Return random prompts of equal length, as ids."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(tokens)] for _ in range(batch)]


def check_room(needed: int, free: int) -> None:
    """Refuse a cache of `needed` bytes where too few are free.

    Raises:
        SkipError: it does not fit.
    """
    if needed > _USABLE * free:
        raise SkipError(f"its KV cache takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def free_bytes(device: str) -> int:
    """Return the bytes that this process can still have: free ones, and those torch keeps unused.

    Without the latter a case that has just run would seem not to fit a second time.
    """
    if device == "cuda":
        import torch

        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept
    import psutil

    return int(psutil.virtual_memory().available)


def installed_version(*packages: str) -> str:
    """Return the version of the first package that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
