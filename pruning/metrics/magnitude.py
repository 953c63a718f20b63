"""Magnitude: the norm of a channel's column in the output projection."""

from torch import Tensor

from pruning.statistics import BlockStatistics


def magnitude(weight_ON: Tensor, statistics: BlockStatistics) -> Tensor:
    """Return |W_:,j|_2 per input channel (N,): Mag-sp of the FLAP comparison, no data used."""
    del statistics
    return weight_ON.double().square().sum(0).sqrt()
