"""One measured number with what is needed to judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary of plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metric:
        """Returns the metric that `to_json` described; unknown or missing keys are errors."""
        names = set(cls.__dataclass_fields__)
        if set(data) != names:
            raise ValueError(f"metric: got keys {sorted(data)}, allowed exactly {sorted(names)}")
        return cls(**data)
