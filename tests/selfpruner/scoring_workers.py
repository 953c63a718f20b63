"""Scoring workers that keep a log, and one that dies: a module, so that workers find it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from selfpruner.blocks import Block
from selfpruner.resident import Post, score_block
from selfpruner.sharing import Floats


def logged(folder: Path, post: Post, number: int, block: Block) -> Floats:
    """Return the scores of a block, and write down who began how many pairs."""
    pairs = len(block.rows) * len(block.sequences)
    with (folder / "pairs.log").open("a") as file:
        file.write(f"{os.getpid()} {pairs}\n")
    return score_block(post, number, block)


def mortal(folder: Path, post: Post, number: int, block: Block) -> Floats:
    """Do as `logged` does; the third block of all kills its process, once."""
    if block.rows and len(begun(folder)) >= 2 and not (folder / "died").exists():
        (folder / "died").write_text(str(len(block.rows) * len(block.sequences)))
        logged(folder, post, number, block)
        os.kill(os.getpid(), signal.SIGKILL)
    return logged(folder, post, number, block)


def doomed(_number: int, block: Block) -> Floats:
    """Die over the first block."""
    del block
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def begun(folder: Path) -> list[tuple[int, int]]:
    """Return process and pairs of every block with pairs that was begun."""
    path = folder / "pairs.log"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [(int(a), int(b)) for a, b in (x.split() for x in lines)]
    return [row for row in rows if row[1]]


def patient_cell(_number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Say in files when it has begun and that it was interrupted."""
    folder = Path(cell["folder"])
    (folder / f"begun-{cell['n']}").touch()
    try:
        for _ in range(1200):
            time.sleep(0.1)
    except KeyboardInterrupt:
        (folder / f"stopped-{cell['n']}").touch()
        raise
    return {}
