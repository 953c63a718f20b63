"""Golden prompts: the exact messages that a driver gets, per strategy and operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.graph import run_search
from agent.state import SearchContext

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    ("moves", "block"),
    ("moves", "layer"),
    ("paper", "block"),
    ("paper", "layer"),
    ("knowledge", "block"),
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
