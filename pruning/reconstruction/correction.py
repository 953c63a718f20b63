"""Corrections of an output projection for every prefix of its input channels.

A block's output projection W (O, N), columns in rank order (most important first), meets inputs
x with moments of the dense model. Cutting at k keeps the first k channels. All three corrections
share one contract: the weight and bias after a cut, and the expected squared output error of
every cut, per token.

Shapes: O output channels, N input channels, k kept.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from pruning.reconstruction.damping import centred, damped_factor
from pruning.spool import Keep, held
from pruning.statistics import BlockStatistics

Reconstruction = Literal["none", "bias", "least_squares"]


class Correction(Protocol):
    """What the survivors carry after a cut."""

    def cut(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight (O, kept) and the bias (O,), or None for no bias, in float32."""

    def errors(self) -> Tensor:
        """Return E|y - y_k|^2 per token for k = 0..N (N + 1,), float64; the last is 0.

        Least squares returns an upper bound of it.
        """


class NoCorrection:
    """The surviving columns as they are."""

    def __init__(self, weight_ON: Tensor, statistics: BlockStatistics, keep: Keep = held) -> None:
        self._kept = keep({"weight": weight_ON, "moments": statistics.gram})

    def cut(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the first `kept` columns and no bias."""
        return self._kept["weight"][:, :kept], None

    def errors(self) -> Tensor:
        """Return tr(W_r H_rr W_r') for the removed suffix r of every cut."""
        return _suffix_energy(self._kept["weight"], self._kept["moments"])


class BiasCorrection:
    """The surviving columns, and a bias that replaces the mean of what was removed.

    FLAP (arXiv 2312.11983, eq. 7): b = sum over removed j of E[x_j] W_:,j.
    """

    def __init__(self, weight_ON: Tensor, statistics: BlockStatistics, keep: Keep = held) -> None:
        moments, mean = centred(statistics), statistics.mean.to(weight_ON)
        self._kept = keep({"weight": weight_ON, "mean": mean, "moments": moments})

    def cut(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the first `kept` columns and the mean output of the others."""
        weight, mean = self._kept["weight"], self._kept["mean"]
        return weight[:, :kept], weight[:, kept:] @ mean[kept:]

    def errors(self) -> Tensor:
        """Return tr(W_r C_rr W_r') with the covariance C of the removed suffix r."""
        return _suffix_energy(self._kept["weight"], self._kept["moments"])


class LeastSquaresCorrection:
    """The ridge solution for every cut from one Cholesky factor.

    With the centred and damped second moment C + lambda I = L L' and M = W L, the minimiser of
    E|W_k x_k - W x|^2 + lambda |W_k - W_:,k|^2 over centred inputs is W_k = M[:, :k] L[:k, :k]^-1:
    one triangular solve a cut, least squares with a ridge towards the original weights. The
    bias W mu - W_k mu_k restores the mean. lambda = `ridge` times the mean diagonal of C.
    """

    def __init__(
        self, weight_ON: Tensor, statistics: BlockStatistics, ridge: float, keep: Keep = held
    ) -> None:
        factor = damped_factor(statistics, ridge)
        product = weight_ON.double() @ factor
        mean = statistics.mean.to(weight_ON)
        self._kept = keep(
            {
                "weight": weight_ON,
                "mean": mean,
                "mean_output": weight_ON @ mean,
                "factor": factor.to(weight_ON.dtype),
                "product": product.to(weight_ON.dtype),
                "errors": _suffix_sums(product.square().sum(0)),
            }
        )

    def cut(self, kept: int) -> tuple[Tensor, Tensor]:
        """Return the ridge solution on the first `kept` channels, and its bias."""
        mean, mean_output = self._kept["mean"], self._kept["mean_output"]
        if kept == len(mean):
            return self._kept["weight"], torch.zeros_like(mean_output)
        factor, product = self._kept["factor"], self._kept["product"]
        weight = torch.linalg.solve_triangular(
            factor[:kept, :kept], product[:, :kept], upper=False, left=False
        )
        return weight, mean_output - weight @ mean[:kept]

    def errors(self) -> Tensor:
        """Return the damped residual of every cut: the energy of the columns of M beyond k.

        It is the error and lambda (|W_k - W_:k|^2 + |W_k:|^2): an upper bound, the looser the more
        of the variance a few channels carry.
        """
        return self._kept["errors"]


def correction(
    name: str, weight_ON: Tensor, statistics: BlockStatistics, ridge: float, keep: Keep = held
) -> Correction:
    """Return the correction by name for a weight (O, N) in float32 or float64, in rank order.

    `keep` is where its tensors go, and what gives them back at each cut.

    Raises:
        ValueError: no correction of that name.
    """
    if name == "none":
        return NoCorrection(weight_ON, statistics, keep)
    if name == "bias":
        return BiasCorrection(weight_ON, statistics, keep)
    if name == "least_squares":
        return LeastSquaresCorrection(weight_ON, statistics, ridge, keep)
    raise ValueError(f"pruning.reconstruction: got {name!r}, allowed none, bias, least_squares")


def _suffix_sums(values_N: Tensor) -> Tensor:
    """Return sums over j >= k for k = 0..N (N + 1,), float64."""
    sums = values_N.double().flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _suffix_energy(weight_ON: Tensor, moments_NN: Tensor) -> Tensor:
    """Return tr(W_r H_rr W_r') for every suffix r = k..N-1, k = 0..N.

    Going from k + 1 to k adds row and column k of (W'W * H) restricted to the suffix.
    """
    products = (weight_ON.T.double() @ weight_ON.double()) * moments_NN.double()
    above = products.triu(1).sum(1)
    return _suffix_sums(products.diagonal() + 2 * above).clamp_min(0)
