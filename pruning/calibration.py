"""Calibration that grows until more tokens no longer help: the amount by held-out error.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pruning.architecture import Architecture
from pruning.families import Family
from pruning.output_projection import output_projections
from pruning.plan import AttentionUnit
from pruning.reconstruction.ridge import held_out_errors
from pruning.statistics import LayerMoments, LayerStatistics, add_layer, is_held_out

ENOUGH = 0.01  # gain of a doubling below which calibration stops
_PROBED = 4  # one layer in so many decides


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers, and how the held-out error fell on the way there.

    `tokens` and `errors`: tokens after each pass, held-out ones included, and the error then
    (geometric mean over the blocks of the probed layers, each per token at its best ridge).
    """

    statistics: list[LayerStatistics]
    tokens: tuple[int, ...]
    errors: tuple[float, ...]


@torch.no_grad()
def grown_calibration(
    model: nn.Module,
    family: Family,
    architecture: Architecture,
    tokens_BT: Tensor,
    unit: AttentionUnit,
    *,
    batch_size: int = 8,
    enough: float = ENOUGH,
) -> Calibration:
    """Return the calibration on as many of `tokens_BT` as are worth their time.

    The first pass runs the held-out micro-batches and an eighth of the others; every further
    pass doubles the others, until the held-out error of the best ridges falls by less than the
    share `enough`, or all are used. Moments are added to, nothing is run twice.

    The price: the moments of all layers are alive at once, fit and held-out apart, 8 N^2 bytes a
    projection (0.6 GB for SmolLM2-135M, 35 GB for a 7B model). Where that is too much, take
    `ElasticModel.rank` on a fixed amount, which needs one layer's.
    """
    batches = tokens_BT.to(family.head(model).device).split(batch_size)
    apart = [is_held_out(index, len(batches)) for index in range(len(batches))]
    held_out = [x for x, is_apart in zip(batches, apart, strict=True) if is_apart]
    fit = [x for x, is_apart in zip(batches, apart, strict=True) if not is_apart]
    moments = [LayerMoments() for _ in family.layers(model)]
    tokens: list[int] = []
    errors: list[float] = []
    for start, stop in _doublings(len(fit)):
        _add_pass(model, family, moments, held_out if start == 0 else [], fit[start:stop])
        tokens.append(moments[0].count)
        errors.append(_held_out_error(model, family, architecture, unit, moments))
        if len(errors) > 1 and errors[-1] > (1 - enough) * errors[-2]:
            break
    statistics = []
    while moments:  # what is finished lets its sums go: not all of both are alive at once
        statistics.append(moments.pop(0).finish())
    return Calibration(statistics, tuple(tokens), tuple(errors))


def _doublings(count: int) -> list[tuple[int, int]]:
    """Return spans that end at an eighth, a quarter, a half and all of `count`, none empty."""
    ends = sorted({math.ceil(count / part) for part in (8, 4, 2, 1)})
    return list(pairwise([0, *ends]))


def _add_pass(
    model: nn.Module,
    family: Family,
    moments: Sequence[LayerMoments],
    held_out: Sequence[Tensor],
    fit: Sequence[Tensor],
) -> None:
    """Run the dense model on further micro-batches and add to the moments of every layer."""
    hidden = [family.embed(model, x) for x in (*held_out, *fit)]
    apart = [True] * len(held_out) + [False] * len(fit)
    rotary = family.rotary(model, hidden[0])
    for layer, sums in zip(family.layers(model), moments, strict=True):
        hidden = add_layer(sums, family, layer, hidden, rotary, apart)


def _held_out_error(
    model: nn.Module,
    family: Family,
    architecture: Architecture,
    unit: AttentionUnit,
    moments: Sequence[LayerMoments],
) -> float:
    """Return the geometric mean of the least held-out error of the probed blocks."""
    logarithms = []
    for layer, sums in list(zip(family.layers(model), moments, strict=True))[::_PROBED]:
        parameters = dict(layer.named_parameters())
        for x in output_projections(parameters, family, architecture, unit, sums.finish()):
            errors = held_out_errors(x).values()
            logarithms += [math.log(max(min(errors), 1e-300))] if errors else []
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 0.0
