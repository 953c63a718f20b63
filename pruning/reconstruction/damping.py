"""The damped covariance of what enters an output projection: what least squares and OBS invert.

Shapes: N input channels of an output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.statistics import BlockStatistics


def centred(statistics: BlockStatistics) -> Tensor:
    """Return the covariance E[x x'] - mu mu' (N, N) in the Gram matrix's dtype."""
    mean = statistics.mean.to(statistics.gram)
    return statistics.gram - torch.outer(mean, mean)


def damped_factor(statistics: BlockStatistics, ridge: float) -> tuple[Tensor, float]:
    """Return L (N, N), float64 and lower triangular, with L L' = C + lambda I, and lambda.

    C is the covariance, because a bias makes up for the mean; lambda = `ridge` times the mean
    diagonal of C, the same for all channels. Where a single channel has most of that diagonal it
    holds the others fast, and the correction comes near that of biases alone.

    Raises:
        ValueError: no damping helps: the moments are not finite.
    """
    covariance = centred(statistics).double()
    damping = ridge * float(covariance.diagonal().clamp_min(0).mean())
    return factored(covariance, damping if damping > 0 else ridge)


def factored(moments_NN: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return L with L L' = moments + lambda I, and lambda: `damping`, or what rounding asks for.

    Works in place: the damping stays on the diagonal of `moments_NN`.

    Raises:
        ValueError: no damping helps: the moments are not finite.
    """
    total = 0.0
    for _ in range(12):
        total += damping
        moments_NN.diagonal().add_(damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moments_NN)
        if not failed:
            return factor, total
        damping *= 9  # about ten times as much in all
    raise ValueError("calibration: the activations are not finite; try dtype: float32")
