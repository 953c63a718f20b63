"""Cells of long experiments: a finished cell is one JSON line and is never run twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

Cell = dict[str, Any]
Figures = dict[str, Any]
Row = dict[str, Any]
Outcomes = Generator[tuple[Cell, Figures], None, None]


def run_cells(path: Path, cells: list[Cell], run: Callable[[Cell], Figures]) -> list[Row]:
    """Return the rows (`cell` and `figures`) of an experiment; run only those not yet on file.

    Rows live in the file `path`, one JSON line each, written when its cell is done.

    Raises:
        ValueError: a line of the file cannot be read.
    """
    return finish_cells(path, cells, lambda todo: ((cell, run(cell)) for cell in todo))


def finish_cells(
    path: Path, cells: list[Cell], outcomes: Callable[[list[Cell]], Outcomes]
) -> list[Row]:
    """Return the rows of `cells`, in their order; those not yet on file come from `outcomes`.

    Args:
        path: the file of rows; no other process may write to it meanwhile.
        cells: what the experiment is made of.
        outcomes: gives the cells that it is handed with their figures, in any order as they are
            done; one that it leaves out has no row.

    Raises:
        ValueError: a line of the file cannot be read, or another process writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing to this file") from None
        _mend(path)
        return _finish(path, file, cells, outcomes)


def _finish(
    path: Path, file: TextIO, cells: list[Cell], outcomes: Callable[[list[Cell]], Outcomes]
) -> list[Row]:
    """Return the rows of `cells`; append those that are not yet on file."""
    rows = [x for x in _rows(path) if x["cell"] in cells]
    todo = [cell for cell in cells if all(x["cell"] != cell for x in rows)]
    with closing(outcomes(todo)) as finished:
        for cell, figures in finished:
            row = {"cell": cell, "figures": figures}
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            rows.append(row)
    found = (next((x for x in rows if x["cell"] == cell), None) for cell in cells)
    return [row for row in found if row is not None]


def _mend(path: Path) -> None:
    """Cut a torn last line, of a process that was killed while it wrote: its cell is run again."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


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
