"""Memory: bytes and counts of weights, and the peak of the process."""

from __future__ import annotations

import resource
import sys

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


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The system reports bytes on macOS and KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024
