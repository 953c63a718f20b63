"""WIFV: how much a channel fluctuates, weighted by its column of the output projection."""

from torch import Tensor

from pruning.statistics import BlockStatistics


def wifv(weight_ON: Tensor, statistics: BlockStatistics) -> Tensor:
    """Return Var(X_j) |W_:,j|_2^2 per input channel (N,): what bias compensation cannot repair.

    FLAP (An et al., arXiv 2312.11983, eq. 5) with the sample variance over tokens. The public
    code deviates: its running mean aliases the old one, so that squares are taken around the
    new mean only and the first sample is skipped; and it squares attention scores before use
    (`wifv_squared`).
    """
    columns = weight_ON.double().square().sum(0)
    return statistics.variance.to(weight_ON.device) * columns


def wifv_squared(weight_ON: Tensor, statistics: BlockStatistics) -> Tensor:
    """Return the square of `wifv` (N,): what FLAP's code sums over a head, the paper silent."""
    return wifv(weight_ON, statistics).square()
