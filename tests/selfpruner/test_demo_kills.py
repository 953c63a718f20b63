"""Soak: the search of the real demo, killed three times, ends as if it had never been."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prompts.library import load_strategy
from selfpruner.config import CONFIGS

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

COMMAND = [sys.executable, "-m", "selfpruner.cli"]
# The search is the demo's own; what comes after it is as short as can be.
AFTER = (
    "pruning.refit=false",
    "evaluation.tasks=[]",
    "evaluation.controls=[]",
    "evaluation.speed.repeats=1",
)
TIMES = ("seconds", "speedup")


def _command(folder: Path, strategy: Path) -> list[str]:
    settings = [*AFTER, f"search.strategy={strategy}"]
    options = [word for setting in settings for word in ("--set", setting)]
    return [*COMMAND, "compress", str(CONFIGS / "demo.yaml"), "--out", str(folder), *options]


def _without_speed(tmp_path: Path) -> Path:
    """Return the demo's strategy without measured speed, which differs from process to process."""
    folder = tmp_path / "moves"
    shutil.copytree(Path(load_strategy.__code__.co_filename).parent / "strategies/moves", folder)
    path = folder / "strategy.yaml"
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**data, "shows": ["accuracy", "sensitivity"]}))
    return folder


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in x.items() if k not in TIMES} for x in rows]


def _sorted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("generation", "operator", "slot", "attempt", "call")
    return sorted(lines, key=lambda x: [str(x.get(n)) for n in names])


def _differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Return what differs, line by line, and the numbers of lines where those do."""
    pairs = zip(found, expected, strict=False)
    lines = [
        f"line {i}: {name}: {one.get(name)!r}, want {other[name]!r}"
        for i, (one, other) in enumerate(pairs)
        for name in other
        if one.get(name) != other[name]
    ]
    if len(found) != len(expected):
        lines.append(f"{len(found)} lines, want {len(expected)}")
    return lines[:10]


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    strategy = _without_speed(tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(_command(whole, strategy), check=True)
    total = len(_lines(whole / "candidates.jsonl"))
    command, goals = _command(cut, strategy), [total // 5, total // 2, 4 * total // 5]
    pause = random.Random(0)
    for goal in goals:
        process = subprocess.Popen(command)
        while len(_lines(cut / "candidates.jsonl")) < goal:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.2)
        time.sleep(pause.uniform(0, 4))
        process.kill()
        process.wait()
        command = [*COMMAND, "resume", str(cut)]
    subprocess.run(command, check=True)
    for name in ("candidates.jsonl", "llm.jsonl"):
        found, expected = _sorted(_lines(cut / name)), _sorted(_lines(whole / name))
        assert _differences(found, expected) == []
    assert (cut / "report.html").is_file()
