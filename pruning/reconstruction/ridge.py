"""The ridge of the least-squares correction, by its error on tokens that the fit did not see.

Shapes: O output channels, N input channels of an output projection, k kept; S sets, U units a set.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pruning.metrics.wifv import wifv
from pruning.output_projection import OutputProjection
from pruning.ranking import permuted
from pruning.reconstruction.correction import LeastSquaresCorrection
from pruning.reconstruction.damping import centred
from pruning.statistics import BlockStatistics
from pruning.units import Units

Ridge = float | Literal["auto"]

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
UNDECIDED = 0.1  # where nothing is held out or nothing can be cut
_SHARES = (1 / 3, 2 / 3)  # of the units kept, where the ridges are compared


def held_out_ridge(projection: OutputProjection) -> float:
    """Return the ridge of `RIDGES` with the least held-out output error, summed over cuts.

    Fitted to the tokens that are not held out, at a third and two thirds of the units. Units go
    in the order of WIFV whatever the metric of the run: the ridge answers to the noise in the
    moments, and a removal metric needs it before there is an order. The best ridge falls with the
    number of tokens; all of them take part in the correction itself.
    """
    errors = held_out_errors(projection)
    return min(errors, key=errors.__getitem__) if errors else UNDECIDED


def held_out_errors(projection: OutputProjection) -> dict[float, float]:
    """Return the held-out output error per token of each ridge, summed over the cuts compared.

    Empty where nothing is held out or a block has a single unit.
    """
    units, cuts = projection.units, _cuts(projection.units)
    if projection.statistics.held_out is None or not cuts:
        return {}
    scores = units.mean(wifv(projection.measured, projection.statistics))
    columns = units.columns(scores.argsort(dim=1, descending=True, stable=True))
    statistics = permuted(projection.statistics, columns)
    weight, fit, held_out = projection.measured[:, columns], statistics.fit, statistics.held_out
    assert held_out is not None
    errors = {}
    for ridge in RIDGES:
        made = LeastSquaresCorrection(weight, fit, ridge)
        errors[ridge] = sum(output_error(weight, *made.cut(kept), held_out) for kept in cuts)
    return errors


def output_error(
    weight_ON: Tensor, small_OK: Tensor, bias_O: Tensor, statistics: BlockStatistics
) -> float:
    """Return E|W x - W_k x_k - b|^2 per token under the given moments, in float32 products.

    With D the difference of the weights, tr(D C D') of the covariance C and |D mu - b|^2.
    """
    difference = weight_ON.clone()
    difference[:, : small_OK.shape[1]] -= small_OK
    covariance = centred(statistics).to(difference.dtype)
    spread = ((difference @ covariance) * difference).sum()
    shift = difference @ statistics.mean.to(difference) - bias_O
    return float(spread + shift.square().sum())


def _cuts(units: Units) -> list[int]:
    """Return the numbers of channels kept at which ridges are compared, none twice."""
    step = units.sets * units.channels
    kept = {round(share * units.per_set) for share in _SHARES}
    return [step * k for k in sorted(kept) if 0 < k < units.per_set]
