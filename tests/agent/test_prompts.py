"""Golden prompts: the exact messages that a driver gets, per strategy and operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.graph import run_search
from agent.settings import DriverSettings
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.architecture import Architecture
from pruning.plan import Budget, Grid

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    ("moves", "block"),
    ("moves", "layer"),
    ("paper", "block"),
    ("paper", "layer"),
]
OPERATORS = ("generate", "select", "crossover", "mutate", "repair")


def first_prompts(context: SearchContext, folder: Path) -> dict[str, str]:
    """Return the first rendered prompt of every operator in a short search."""
    run_search(context, folder / "checkpoints.sqlite")
    found: dict[str, str] = {}
    for line in context.ledger.lines():
        name = "repair" if line.attempt else line.operator
        text = "\n".join(f"<{m['role']}>\n{m['content']}" for m in line.messages)
        found.setdefault(name, text + "\n")
    return found


@pytest.mark.parametrize(("strategy", "granularity"), CASES)
def test_golden_prompts(
    scene: Callable[..., SearchContext], tmp_path: Path, strategy: str, granularity: str
) -> None:
    context = scene(
        allocator="llm",
        replies=["No."],
        strategy=strategy,
        granularity=granularity,
        evaluations=14,
    )
    prompts = first_prompts(context, tmp_path)
    assert set(prompts) == set(OPERATORS)
    for operator, text in prompts.items():
        path = GOLDEN / f"{strategy}_{granularity}_{operator}.txt"
        assert text == path.read_text(encoding="utf-8"), path.name


@pytest.fixture
def smollm(scene: Callable[..., SearchContext]) -> Callable[[str], SearchContext]:
    def make(strategy: str) -> SearchContext:
        context = scene(allocator="llm", replies=["No."], evaluations=14)
        architecture = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)
        grid = Grid.of(architecture, 32)
        row = [[0.5, 0.2, 0.0], [0.01 * (48 - i) ** 1.5 for i in range(1, 49)]]
        for name, value in {
            "grid": grid,
            "budget": Budget.of(architecture, grid, "parameters", 0.7),
            "strategy": load_strategy(strategy),
            "sensitivity": [[[x * (i + 1) for x in y] for y in row] for i in range(30)],
            "driver_settings": DriverSettings(),
            "score": lambda plans, sequences: np.ones((len(plans), len(sequences))),
        }.items():
            object.__setattr__(context, name, value)
        return context

    return make


@pytest.mark.parametrize("strategy", ["moves", "paper"])
def test_prompts_of_thirty_layers_are_short(
    smollm: Callable[[str], SearchContext], tmp_path: Path, strategy: str
) -> None:
    """Digits are tokens of their own in small vocabularies, other words about four characters."""
    for operator, text in first_prompts(smollm(strategy), tmp_path).items():
        digits = sum(x.isdigit() for x in text)
        signs = sum(not x.isalnum() and not x.isspace() for x in text)
        letters = sum(x.isalpha() for x in text)
        assert digits + signs + letters / 4 < 1100, (operator, digits, signs, letters)
