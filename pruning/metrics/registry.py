"""Metrics by name: weight (O, N) and statistics in, importance of N channels out, high = keep.

Two kinds. A channel metric looks at each channel by itself. A removal metric finds the order in
which units leave, each step knowing who has left before; its importance is the step.
"""

from __future__ import annotations

from torch import Tensor

from pruning.metrics.magnitude import magnitude
from pruning.metrics.obs import obs
from pruning.metrics.random import random
from pruning.metrics.wanda_sp import wanda_sp
from pruning.metrics.wifv import wifv, wifv_squared
from pruning.statistics import BlockStatistics
from pruning.units import Units

CHANNEL_METRICS = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "wifv": wifv,
    "wifv_squared": wifv_squared,
}
REMOVAL_METRICS = {"obs": obs}
NAMES = (*CHANNEL_METRICS, *REMOVAL_METRICS, "random")


def channel_scores(
    name: str,
    weight_ON: Tensor,
    statistics: BlockStatistics,
    units: Units,
    *,
    ridge: float,
    seed: int,
) -> Tensor:
    """Return the importance (N,) in float64 of each input channel.

    `ridge` is that of the least-squares correction, for metrics that assume it; `seed` is for
    `random`. Channels of one unit may only be compared by their sum.

    Raises:
        ValueError: no metric of that name.
    """
    if name == "random":
        return random(weight_ON, statistics, seed)
    if name in REMOVAL_METRICS:
        return REMOVAL_METRICS[name](weight_ON, statistics, units, ridge)
    if name not in CHANNEL_METRICS:
        raise ValueError(f"pruning.metric: got {name!r}, allowed {', '.join(NAMES)}")
    return CHANNEL_METRICS[name](weight_ON, statistics)
