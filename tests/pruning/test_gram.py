"""Symmetric sums computed in panels, against whole products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruning import gram

WIDTHS = (1, 7, 8, 9, 16, 27)


def _flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    """Return the operations of `addmm_`, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@pytest.fixture(autouse=True)
def _narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "PANEL", 8)


@pytest.mark.parametrize("width", WIDTHS)
def test_panels_add_up_to_the_whole_products(width: int) -> None:
    first, second = torch.randn(5, width).double(), torch.randn(3, width).double()
    sums = gram.add_products(gram.products(first), second)
    found = gram.filled(sums / 8)
    assert torch.allclose(found, (first.T @ first + second.T @ second) / 8, rtol=0, atol=1e-14)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_more_is_computed_than_is_said(width: int) -> None:
    x = torch.randn(5, width)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _flops}) as counter:
        gram.products(x)
    assert counter.get_total_flops() == 2 * 5 * gram.products_per_token(width)


def test_a_wide_matrix_costs_little_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert gram.products_per_token(28_672) < 0.54 * 28_672**2
    assert gram.products_per_token(1_536) == 1_536**2


def test_one_panel_is_a_single_product() -> None:
    x = torch.randn(64, 8)
    assert torch.equal(gram.filled(gram.products(x)), x.T @ x)
