"""Wanda-sp: weight magnitude times activation norm, averaged over a channel's column."""

from torch import Tensor

from pruning.statistics import BlockStatistics


def wanda_sp(weight_ON: Tensor, statistics: BlockStatistics) -> Tensor:
    """Return mean_i |W_ij| |X_j|_2 per input channel (N,).

    Structured Wanda (Sun et al., arXiv 2306.11695, eq. 1, with the column mean of the FLAP
    comparison, arXiv 2312.11983). |X_j|_2 is the root mean square over tokens: the paper's norm
    up to a constant that no ranking sees.
    """
    return weight_ON.double().abs().mean(0) * statistics.square.sqrt().to(weight_ON.device)
