"""Cells of long experiments: a finished cell is one JSON line and is never run twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
Row = dict[str, Any]


def run_cells(path: Path, cells: list[Cell], run: Callable[[Cell], dict[str, Any]]) -> list[Row]:
    """Return the rows (`cell` and `figures`) of an experiment; run only those not yet on file.

    Rows live in the file `path`, one JSON line each, written when its cell is done.

    Raises:
        ValueError: a line of the file cannot be read.
    """
    known = _rows(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for cell in cells:
        row = next((x for x in known if x["cell"] == cell), None)
        if row is None:
            row = {"cell": cell, "figures": run(cell)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        rows.append(row)
    return rows


def _rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict) or set(row) != {"cell", "figures"}:
            raise ValueError(f"{path}, line {number}: want an object with cell and figures")
        rows.append(row)
    return rows
