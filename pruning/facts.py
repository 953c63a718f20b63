"""Facts for classical allocators, from the same calibration pass: plain numbers, no tensors.

Shapes: N input channels of an output projection, U units that a plan counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.families import Family
from pruning.metrics.wifv import wifv
from pruning.output_projection import OutputProjection
from pruning.statistics import LayerStatistics

OUTLIER_FACTOR = 5.0  # OWL's M


@dataclass(frozen=True)
class LayerFacts:
    """What allocators ask of one layer.

    `outliers` is OWL's outlier share in per cent. `attention` and `mlp` are FLAP's standardised
    scores of the units that a plan counts, in rank order: the first is the last to be removed.
    """

    outliers: float
    attention: tuple[float, ...]
    mlp: tuple[float, ...]


@dataclass(frozen=True)
class AllocationFacts:
    """The facts of all layers: one value a layer, or one value a unit and layer."""

    outliers: tuple[float, ...]
    attention: tuple[tuple[float, ...], ...]
    mlp: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, layers: Iterable[LayerFacts]) -> AllocationFacts:
        """Return the facts of a model from those of its layers."""
        rows = list(layers)
        return cls(
            tuple(row.outliers for row in rows),
            tuple(row.attention for row in rows),
            tuple(row.mlp for row in rows),
        )


def outlier_share(
    family: Family, parameters: Mapping[str, Tensor], statistics: LayerStatistics
) -> float:
    """Return 100 * #{A_ij > M mean(A)} / #A of one layer, A the Wanda scores of all its linears.

    OWL (Yin et al., arXiv 2310.05175, eq. 1 and 2) with A_ij = |W_ij| |X_j|_2 and M = 5; the seven
    linears count as one long vector, as in the public code. |X_j|_2 is the root mean square over
    tokens, the paper's norm up to one constant that the share does not see.
    """
    attention, mlp = statistics.entry_squares
    squares = {
        family.q: attention,
        family.k: attention,
        family.v: attention,
        family.o: statistics.attention.square,
        family.gate: mlp,
        family.up: mlp,
        family.down: statistics.mlp.square,
    }
    pairs = [(parameters[f"{role}.weight"].detach(), x.sqrt()) for role, x in squares.items()]
    count = sum(weight.numel() for weight, _ in pairs)
    total = sum(float((w.abs().sum(0, dtype=torch.float64) * x).sum()) for w, x in pairs)
    threshold = OUTLIER_FACTOR * total / count
    above = sum(int((w.abs() * x.to(w) > threshold).sum()) for w, x in pairs)
    return 100 * above / count


def standardised_scores(
    projection: OutputProjection, columns_N: Tensor, *, squared: bool
) -> tuple[float, ...]:
    """Return FLAP's standardised score of every unit that a plan counts, in rank order.

    `columns_N` are the channels of the projection in rank order, every cut a prefix; the first
    score belongs to the unit that is the last to go. Only WIFV that ranks makes them fall.

    FLAP (An et al., arXiv 2312.11983, eq. 6, structure AL-AM): WIFV by channel, `squared` for
    attention as the public code does though the paper does not say so, (s - mean) / std over the
    channels of the block, and the mean over the channels of a unit. The code's variance is
    another (see `wifv`), its unit a head of 128 channels and its global threshold weighs a head
    as 512 / 3 channels: right for Llama 7B only. Here a unit is what a plan counts, with all its
    query heads, so that a threshold can weigh it by what it costs.
    """
    scores = wifv(projection.weight, projection.statistics)
    scores = scores.square() if squared else scores
    spread = scores.std()
    standardised = (scores - scores.mean()) / (spread if spread > 0 else 1.0)
    scores_U: Tensor = standardised[columns_N].view(projection.units.per_set, -1).mean(1)
    return tuple(scores_U.tolist())
