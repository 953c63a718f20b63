"""The output projection of a block, before anything is ranked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pruning.statistics import BlockStatistics
from pruning.units import Units


@dataclass(frozen=True)
class OutputProjection:
    """An output projection in the dense order of its channels, and what is known of it.

    Attributes:
        weight: (O, N) in float32 or float64.
        statistics: moments of its N input channels.
        units: how the channels leave together.
    """

    weight: Tensor
    statistics: BlockStatistics
    units: Units
