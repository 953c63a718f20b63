"""The output projection of a block, before anything is ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.architecture import Architecture
from pruning.curvature import LayerCurvature
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
        root: R (O, O), by which errors of the output are measured, as |R d|^2; None: as |d|^2.
    """

    weight: Tensor
    statistics: BlockStatistics
    units: Units
    root: Tensor | None = None

    @property
    def measured(self) -> Tensor:
        """The weight (O, N) of the output as it is measured."""
        return self.weight if self.root is None else self.root.to(self.weight) @ self.weight


def output_projections(
    parameters: Mapping[str, Tensor],
    family: Family,
    architecture: Architecture,
    unit: AttentionUnit,
    statistics: LayerStatistics,
    curvature: LayerCurvature | None = None,
) -> tuple[OutputProjection, OutputProjection]:
    """Return the output projections of attention and MLP of one dense layer.

    `parameters` are the layer's own, named as in the stock layer; weights are widened to float32.
    """
    output, down = (parameters[f"{role}.weight"].detach() for role in (family.o, family.down))
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    attention_units, mlp_units = Units.attention(architecture, unit), Units.mlp(architecture)
    roots = (None, None) if curvature is None else (curvature.attention, curvature.mlp)
    return (
        OutputProjection(output.to(wide), statistics.attention, attention_units, roots[0]),
        OutputProjection(down.to(wide), statistics.mlp, mlp_units, roots[1]),
    )
