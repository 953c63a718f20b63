"""One measured number with what is needed to judge it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measured value.

    Attributes:
        name: What was measured, e.g. `perplexity`.
        value: The number, in `unit`.
        stderr: Standard error of `value` in the same unit; None where one observation gives none.
        n: Number of independent observations behind `value` (windows, items, repeats).
        unit: Unit of `value`; empty for a pure number.
        higher_is_better: Direction of improvement.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    unit: str
    higher_is_better: bool
