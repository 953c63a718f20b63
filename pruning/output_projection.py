"""The output projection of a block, before anything is ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.architecture import Architecture
from pruning.families import Family
from pruning.plan import AttentionUnit
from pruning.statistics import BlockStatistics, LayerStatistics
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


def output_projections(
    parameters: Mapping[str, Tensor],
    family: Family,
    architecture: Architecture,
    unit: AttentionUnit,
    statistics: LayerStatistics,
) -> tuple[OutputProjection, OutputProjection]:
    """Return the output projections of attention and MLP of one dense layer.

    `parameters` are the layer's own, named as in the stock layer; weights are widened to float32.
    """
    output, down = (parameters[f"{role}.weight"].detach() for role in (family.o, family.down))
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    attention_units = Units.attention(architecture, unit)
    return (
        OutputProjection(output.to(wide), statistics.attention, attention_units),
        OutputProjection(down.to(wide), statistics.mlp, Units.mlp(architecture)),
    )
