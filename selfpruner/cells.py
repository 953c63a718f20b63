"""Cells of long experiments: a finished cell is one JSON line and is never run twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def run_cells(
    name: str, cells: list[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows (cell and figures) of an experiment; run only those not yet on file.

    Rows live in `results/<name>.jsonl`, flushed one by one.
    """
    path = RESULTS / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = []
    for cell in cells:
        row = next((x for x in known if x["cell"] == cell), None)
        if row is None:
            row = {"cell": cell, "figures": run(cell)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows
