"""Experiments: configuration, cells that are never run twice, tables read off the courses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfpruner.cells import run_cells
from selfpruner.config import CONFIGS
from selfpruner.experiment import load_experiment
from selfpruner.experiment_table import tables


def test_the_shipped_experiments_are_valid() -> None:
    files = sorted((CONFIGS / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert len(load_experiment(file).arms) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b.yaml\narms: {a: {pruning.step: 8}}", "arms.a: got pruning.step; allowed: names"),
        ("base: b.yaml\narms: {}", "arms: "),
        ("arms: {a: {}}", "base: not given"),
        ("base: b.yaml\narms: {a: {}}\nsedes: [1]", "unknown key sedes; did you mean seeds?"),
    ],
)
def test_a_wrong_experiment_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"e\.yaml: ") as refusal:
        load_experiment(path)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    path, ran = tmp_path / "results" / "x.jsonl", []

    def figures(cell: dict[str, Any]) -> dict[str, Any]:
        if cell["n"] == 2 and len(ran) < 3:
            raise KeyboardInterrupt
        ran.append(cell["n"])
        return {"square": cell["n"] ** 2}

    cells = [{"n": n} for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run_cells(path, cells, figures)
    assert [json.loads(x)["cell"]["n"] for x in path.read_text().splitlines()] == [0, 1]
    ran.append(-1)
    rows = run_cells(path, cells, figures)
    assert [x["figures"]["square"] for x in rows] == [0, 1, 4, 9]
    assert ran == [0, 1, -1, 2, 3]
    path.write_text(path.read_text() + "{torn")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 5: not JSON"):
        run_cells(path, cells, figures)


def _row(arm: str, seed: int, tokens: int, steps: list[tuple[int, int, float]]) -> dict[str, Any]:
    names = ("evaluations", "tokens", "fitness")
    return {
        "cell": {"arm": arm, "seed": seed},
        "figures": {
            "evaluations": 10,
            "llm_calls": 3,
            "llm_tokens": tokens,
            "fallbacks": 1,
            "duplicates": 0,
            "seconds": 2.0,
            "steps": [
                dict(zip(names, x, strict=True)) | {"selection_fitness": x[2] + 1} for x in steps
            ],
        },
    }


def test_tables_read_every_run_off_at_the_same_point() -> None:
    rows = [
        _row("wordy", 0, 900, [(1, 100, 0.9), (5, 450, 0.5), (9, 900, 0.1)]),
        _row("wordy", 1, 800, [(1, 100, 0.9), (5, 450, 0.7), (9, 800, 0.3)]),
        _row("terse", 0, 500, [(1, 50, 0.8), (10, 500, 0.4)]),
        _row("evolution", 0, 0, [(1, 0, 0.9), (10, 0, 0.6)]),
    ]
    evaluations, tokens = tables(rows).split("\n\nAt ")
    assert evaluations.startswith("At 10 evaluations")
    assert tokens.startswith("500 tokens")
    assert "evolution" not in tokens
    lines = {x.split(" | ")[0].strip("| "): x for x in evaluations.splitlines()[4:]}
    assert list(lines) == ["wordy", "terse", "evolution"]
    assert "| 1.2000 ± 0.1414 | 0.2000 ± 0.1414 |" in lines["wordy"]
    lines = {x.split(" | ")[0].strip("| "): x for x in tokens.splitlines()[4:]}
    assert list(lines) == ["terse", "wordy"]
    assert "| 1.6000 ± 0.1414 |" in lines["wordy"]
    assert lines["terse"] == "| terse | 1 | 1.4000 | 0.4000 |"
