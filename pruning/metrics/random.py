"""Random scores: the control that any metric must beat."""

import torch
from torch import Tensor

from pruning.statistics import BlockStatistics


def random(weight_ON: Tensor, statistics: BlockStatistics, seed: int) -> Tensor:
    """Return uniform scores in [0, 1) per input channel (N,), a function of `seed` alone."""
    del statistics
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(weight_ON.shape[1], generator=generator, dtype=torch.float64)
    return scores.to(weight_ON.device)
