"""Cells without a model for the tests of workers: a module, so that other processes find it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from selfpruner.workforce import Workforce


def square(number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return the square, and who made it."""
    return {"square": cell["n"] ** 2, "process": os.getpid(), "worker": number}


def square_or_die(number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return the square; the process of cell 1 is killed."""
    if cell["n"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number, cell)


def square_or_refuse(number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return the square; cell 1 is refused by the program, cell 2 by a library."""
    if cell["n"] == 1:
        Workforce.parse("none", None)
    if cell["n"] == 2:
        raise ValueError("operands could not be broadcast")
    return square(number, cell)


def wait_for_a_signal(number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Say in files when it has begun and how it has ended."""
    folder = Path(cell["folder"])
    (folder / f"begun-{number}").touch()
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        (folder / f"stopped-{number}").touch()
        raise
    return {}
