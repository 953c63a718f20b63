"""Sums of x x' over tokens. They are symmetric: of a wide one little more than half is computed.

Rows are taken in panels, from the panel's own columns on; what lies before is mirrored once the
sums are complete. A sum of one panel is a single product. What `plan` counts needs no torch.

Shapes: T tokens, N channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 2048  # rows of a product; fewer leave fast kernels little to do


def products(x_TN: Tensor) -> Tensor:
    """Return x' x (N, N), to be `filled`."""
    width = x_TN.shape[1]
    if width <= PANEL:
        return x_TN.T @ x_TN
    return add_products(x_TN.new_zeros(width, width), x_TN)


def add_products(sums_NN: Tensor, x_TN: Tensor) -> Tensor:
    """Add x' x to the sums in place, to be `filled`, and return them."""
    for start in range(0, len(sums_NN), PANEL):
        rows = slice(start, start + PANEL)
        sums_NN[rows, start:].addmm_(x_TN[:, rows].T, x_TN[:, start:])
    return sums_NN


def filled(sums_NN: Tensor) -> Tensor:
    """Mirror into place, in place, what was not computed, and return the whole matrix."""
    for start in range(0, len(sums_NN), PANEL):
        stop = start + PANEL
        sums_NN[stop:, start:stop] = sums_NN[start:stop, stop:].T
    return sums_NN


def products_per_token(width: int) -> int:
    """Return how many of the width x width products of a token are computed."""
    panels = range(0, width, PANEL)
    return sum(min(PANEL, width - start) * (width - start) for start in panels)
