"""Corrections of an output projection for every prefix of its input channels.

A block's output projection W (O, N), columns in rank order (most important first), meets inputs
x with moments of the dense model. Cutting at k keeps the first k channels. All three corrections
share one contract: the weight and bias after a cut, and the expected output error of cuts, per
token: |y - y_k|^2, or |R (y - y_k)|^2 where a root R (O, O) says how errors are measured.

Shapes: O output channels, N input channels, k kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pruning.reconstruction.damping import centred, damped_factor
from pruning.spool import Keep, held
from pruning.statistics import BlockStatistics

_ROWS = 512  # of an inverse that are solved for at once: each solve reads the factor anew


@dataclass(frozen=True)
class OutputGradient:
    """The gradient g (O,) of a loss in a block's output y, summed up over tokens.

    Attributes:
        cross: sum of g x' (O, N), x what enters the output projection, in rank order.
        total: sum of g (O,).
    """

    cross: Tensor
    total: Tensor

    def centred(self, mean_N: Tensor) -> Tensor:
        """Return the sum of g (x - mu)' (O, N)."""
        return self.cross - torch.outer(self.total, mean_N)


class Correction(Protocol):
    """What the survivors carry after a cut."""

    def cut(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight (O, kept) and the bias (O,), or None for no bias, in float32."""

    def errors(self, cuts: Sequence[int], root_OO: Tensor | None = None) -> Tensor:
        """Return E|R (y - y_k)|^2 per token for each k of `cuts`, float64; 0 for N."""

    def slopes(self, cuts: Sequence[int], gradient: OutputGradient) -> Tensor:
        """Return the sum of g' (y_k - y_0) over tokens for each k of `cuts`, float64.

        Differences between two cuts are what going from one to the other adds to the loss, to
        first order.
        """


class NoCorrection:
    """The surviving columns as they are."""

    def __init__(self, weight_ON: Tensor, statistics: BlockStatistics, keep: Keep = held) -> None:
        self._kept = keep({"weight": weight_ON, "moments": statistics.gram})

    def cut(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the first `kept` columns and no bias."""
        return self._kept["weight"][:, :kept], None

    def errors(self, cuts: Sequence[int], root_OO: Tensor | None = None) -> Tensor:
        """Return tr(V_r H_rr V_r') with V = R W for the removed suffix r of every cut."""
        weight = _measured(self._kept["weight"], root_OO)
        return _suffix_energy(weight, self._kept["moments"])[list(cuts)]

    def slopes(self, cuts: Sequence[int], gradient: OutputGradient) -> Tensor:
        """Return tr(W_k G_k') for the first k columns of W and G = sum g x'."""
        return _prefix_products(self._kept["weight"], gradient.cross)[list(cuts)]


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

    def errors(self, cuts: Sequence[int], root_OO: Tensor | None = None) -> Tensor:
        """Return tr(V_r C_rr V_r') with V = R W and the covariance C of the removed suffix r."""
        weight = _measured(self._kept["weight"], root_OO)
        return _suffix_energy(weight, self._kept["moments"])[list(cuts)]

    def slopes(self, cuts: Sequence[int], gradient: OutputGradient) -> Tensor:
        """Return tr(W_k G_k') with G = sum g (x - mu)': the bias keeps the mean of the output."""
        centred_ON = gradient.centred(self._kept["mean"])
        return _prefix_products(self._kept["weight"], centred_ON)[list(cuts)]


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
        factor, self._damping = damped_factor(statistics, ridge)
        product = weight_ON.double() @ factor
        mean = statistics.mean.to(weight_ON)
        self._kept = keep(
            {
                "weight": weight_ON,
                "mean": mean,
                "mean_output": weight_ON @ mean,
                "factor": factor.to(weight_ON.dtype),
                "product": product.to(weight_ON.dtype),
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

    def errors(self, cuts: Sequence[int], root_OO: Tensor | None = None) -> Tensor:
        """Return E|R (W_k x_k - W x)|^2 of the ridge solutions over centred inputs.

        The energy of the columns of R M beyond k is that error and lambda |R D_k|^2, where D_k is
        what the cut changes in the weight, removed columns included: D_k = M_r [L^-1]_r,: for the
        removed suffix r.
        """
        factor = self._kept["factor"].double()
        product = _measured(self._kept["product"], root_OO).double()
        energies, change = _suffix_sums(product.square().sum(0)), torch.zeros_like(product)
        errors, settled, end = energies.new_zeros(len(cuts)), energies.new_zeros(()), len(factor)
        for places in _neighbours(cuts, end):
            start = cuts[places[-1]]
            rows = _inverse_rows(factor, start, end)
            for place in places:
                kept = cuts[place]
                change[:, :end] += product[:, kept:end] @ rows[kept - start : end - start, :end]
                settled += change[:, kept:end].square().sum()  # later cuts change what is before
                moved = settled + change[:, :kept].square().sum()
                errors[place] = energies[kept] - self._damping * moved
                end = kept
        return errors.clamp_min(0)

    def slopes(self, cuts: Sequence[int], gradient: OutputGradient) -> Tensor:
        """Return tr(W_k G_k') with G = sum g (x - mu)', for all cuts by one triangular solve.

        W_k G_k' = M_k L_kk^-1 G_k', and the first k rows of L^-1 G' are L_kk^-1 G_k'.
        """
        centred_ON = gradient.centred(self._kept["mean"])
        solved_NO = torch.linalg.solve_triangular(self._kept["factor"], centred_ON.T, upper=False)
        return _prefix_products(self._kept["product"], solved_NO.T)[list(cuts)]


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


def _neighbours(cuts: Sequence[int], width: int) -> Iterator[list[int]]:
    """Yield the places of cuts, the widest first, those between few rows of a factor together."""
    run, end = list[int](), width
    for place in sorted(range(len(cuts)), key=lambda place: -cuts[place]):
        if run and cuts[place] < end - _ROWS:
            yield run
            run, end = [], cuts[run[-1]]
        run.append(place)
    if run:
        yield run


def _inverse_rows(factor_NN: Tensor, start: int, end: int) -> Tensor:
    """Return rows `start` to `end` of the inverse of a lower triangle, what is not 0 of them."""
    unit = factor_NN.new_zeros(end - start, end)
    unit[:, start:].fill_diagonal_(1)
    rows: Tensor = torch.linalg.solve_triangular(
        factor_NN[:end, :end], unit, upper=False, left=False
    )
    return rows


def _measured(weight_ON: Tensor, root_OO: Tensor | None) -> Tensor:
    """Return R W, or W where there is no R."""
    return weight_ON if root_OO is None else root_OO.to(weight_ON) @ weight_ON


def _prefix_products(left_ON: Tensor, right_ON: Tensor) -> Tensor:
    """Return the sum of the products of the first k columns for k = 0..N (N + 1,), float64."""
    sums = (left_ON * right_ON).sum(0).double().cumsum(0)
    return torch.cat([sums.new_zeros(1), sums])


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
