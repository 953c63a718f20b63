"""Metrics by name: weight (O, N) and statistics in, importance of N channels out, high = keep."""

from __future__ import annotations

from torch import Tensor

from pruning.metrics.magnitude import magnitude
from pruning.metrics.random import random
from pruning.metrics.wanda_sp import wanda_sp
from pruning.metrics.wifv import wifv
from pruning.statistics import BlockStatistics

METRICS = {"magnitude": magnitude, "wanda_sp": wanda_sp, "wifv": wifv}
NAMES = (*METRICS, "random")


def channel_scores(name: str, weight_ON: Tensor, statistics: BlockStatistics, seed: int) -> Tensor:
    """Return the importance (N,) in float64 of each input channel; `seed` is for `random`.

    Raises:
        ValueError: no metric of that name.
    """
    if name == "random":
        return random(weight_ON, statistics, seed)
    if name not in METRICS:
        raise ValueError(f"pruning.metric: got {name!r}, allowed {', '.join(NAMES)}")
    return METRICS[name](weight_ON, statistics)
