"""What each block is thought to lose at each level, before plans are scored.

The shape over levels is that of the closed-form cut errors, the scale that of the probes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.allocators import Sensitivity
from agent.ledger import Probe
from agent.projection import Floats
from agent.racing import is_broken

Curves = list[list[Floats]]

_LEAST = 0.1  # of the usual ratio: no block is thought to be free because a probe was lucky


def loss_curves(sensitivity: Sensitivity, probes: Sequence[Probe]) -> Curves:
    """Return `[layer][block]` losses by level (levels,), 0 for the dense level, never below 0.

    A curve is the cut error times the ratio of measured loss to cut error at the levels probed,
    linear between them and constant beyond. Ratios are at least a tenth of the median of their
    kind of block, which also stands in where a block has no probe. Without probes the cut errors
    themselves are the curves; they know of no scale but a common one.
    """
    curves = [[_errors(block) for block in layer] for layer in sensitivity]
    measured = _losses(probes)
    for block in (0, 1):
        ratios = {
            (layer, level): loss / error
            for (layer, b, level), loss in measured.items()
            if b == block and (error := float(curves[layer][block][level])) > 0
        }
        usual = float(np.median([x for x in ratios.values() if x > 0] or [1.0]))
        for layer, curve in enumerate(row[block] for row in curves):
            known = sorted((x, r) for (i, x), r in ratios.items() if i == layer)
            points, scales = zip(*(known or [(0, usual)]), strict=True)
            least = np.maximum(scales, _LEAST * usual)
            curves[layer][block] = curve * np.interp(np.arange(len(curve)), points, least)
    return curves


def _errors(errors: Sequence[float]) -> Floats:
    """Return cut errors above that of the dense level; one that is not finite counts as the worst.

    An error that says nothing of any level (all of them not finite) is 0 throughout.
    """
    values = np.asarray(errors, dtype=np.float64)
    finite = values[np.isfinite(values)]
    clean = np.where(np.isfinite(values), values, finite.max(initial=0.0))
    above: Floats = np.maximum(clean - clean[-1], 0.0)
    return above


def _losses(probes: Sequence[Probe]) -> dict[tuple[int, int, int], float]:
    """Return what each cut adds to the dense model's fitness on the same sequences."""
    dense = next((np.array(x.values) for x in probes if x.layer is None), None)
    found: dict[tuple[int, int, int], float] = {}
    for probe in probes:
        layer, block, level = probe.cut
        row = np.array(probe.values)
        if layer is None or block is None or level is None or dense is None or is_broken(row):
            continue
        shared = min(len(row), len(dense))
        found[layer, block, level] = float((row[:shared] - dense[:shared]).mean())
    return found
