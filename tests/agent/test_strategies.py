"""Golden prompts of the strategies that look back: what a driver gets in the third generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.drivers.driver import Completion, MayRetry, Place, Request
from agent.graph import run_search
from agent.settings import DriverSettings
from agent.state import SearchContext
from prompts.library import Strategy, load_strategy
from pruning.architecture import Architecture
from pruning.plan import Budget, Grid

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    ("with_statistics", "block"),
    ("with_statistics", "layer"),
    ("reasoning", "block"),
    ("history", "block"),
    ("reflection", "block"),
]
OPERATORS = ("generate", "select", "crossover", "mutate", "repair")


@dataclass
class SensibleDriver:
    """Answers in the right form, by the place of the request; one first attempt goes wrong."""

    strategy: Strategy
    layers: int

    def complete(self, requests: Sequence[Request], _: MayRetry) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            broken = request.place == Place(0, 3, "generate", 0)
            text = "No." if broken else json.dumps(self.reply(request))
            yield Completion(number, text, 100, 20, 0.5, "fake")

    def reply(self, request: Request) -> dict[str, Any]:
        place = request.place
        where = f"{place.generation}.{place.slot}"
        said = {x: f"{x} {where}: a{{b}}\n<|c|>" for x in self.strategy.words(place.operator)}
        if place.operator == "select":
            known = request.schema["properties"]["parents"]["items"]["enum"]
            return {**said, "parents": known[:3]}
        return {**said, **self.answer(place)}

    def answer(self, place: Place) -> dict[str, Any]:
        if place.operator == "crossover":
            return {"from_second": [place.slot % self.layers]}
        take, gap = (5 * place.slot) % self.layers, 1 + place.generation
        move = {"block": "mlp", "take_from": take, "give_to": (take + gap) % self.layers}
        return {"moves": [{**move, "units": 1 + place.slot % 3}]}

    def close(self) -> None:
        pass


Looking = Callable[..., SearchContext]


@pytest.fixture
def looking(scene: Callable[..., SearchContext]) -> Looking:
    """Return a maker of contexts with a driver that answers well and latencies that are known."""

    def make(strategy: str, **settings: Any) -> SearchContext:
        context = scene(
            allocator="llm",
            replies=[],
            strategy=strategy,
            evaluations=26,
            tokens=90_000,
            **settings,
        )
        assert context.strategy is not None
        driver = SensibleDriver(context.strategy, len(context.sensitivity))
        object.__setattr__(context, "driver", driver)
        object.__setattr__(context, "unit_latency", (35.21, 8.074))
        return context

    return make


def last_prompts(context: SearchContext, folder: Path) -> dict[str, str]:
    """Return the last rendered prompt of every operator in a search."""
    run_search(context, folder / "checkpoints.sqlite")
    found: dict[str, str] = {}
    for line in context.ledger.lines():
        name = "repair" if line.attempt else line.operator
        found[name] = "\n".join(f"<{m['role']}>\n{m['content']}" for m in line.messages) + "\n"
    return found


@pytest.mark.parametrize(("strategy", "granularity"), CASES)
def test_golden_prompts(looking: Looking, tmp_path: Path, strategy: str, granularity: str) -> None:
    context = looking(strategy, granularity=granularity)
    prompts = last_prompts(context, tmp_path)
    assert {x.origin for x in context.ledger.candidates()} >= {"heuristic", "llm"}
    assert set(prompts) == set(OPERATORS)
    for operator, text in prompts.items():
        path = GOLDEN / f"{strategy}_{granularity}_{operator}.txt"
        assert text == path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("strategy", ["with_statistics", "reasoning", "history", "reflection"])
def test_a_rerun_asks_the_same(looking: Looking, tmp_path: Path, strategy: str) -> None:
    """The ledger of the first run knows the whole search; the second may not peek into it."""
    context = looking(strategy)
    run_search(context, tmp_path / "first.sqlite")
    lines = context.ledger.lines()
    run_search(context, tmp_path / "second.sqlite")
    assert context.ledger.lines() == lines


@pytest.fixture
def smollm(looking: Looking) -> Callable[[str], SearchContext]:
    """Return a maker of contexts of the grid of a model of 135M parameters."""

    def make(strategy: str) -> SearchContext:
        context = looking(strategy)
        architecture = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)
        grid = Grid.of(architecture, 32)
        row = [[0.5, 0.2, 0.0], [0.01 * (48 - i) ** 1.5 for i in range(1, 49)]]
        weights = np.linspace(1, 3, 30)
        for name, value in {
            "grid": grid,
            "budget": Budget.of(architecture, grid, "parameters", 0.7),
            "strategy": load_strategy(strategy),
            "sensitivity": [[[x * w for x in y] for y in row] for w in weights],
            "driver_settings": DriverSettings(),
            "driver": SensibleDriver(load_strategy(strategy), 30),
            "score": lambda plans, sequences: np.array(
                [[1 + weights @ [x.mlp_channels for x in p.layers]] * len(sequences) for p in plans]
            ),
        }.items():
            object.__setattr__(context, name, value)
        return context

    return make


@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        ("moves", 1100),
        ("paper", 1100),
        ("with_statistics", 1700),
        ("reasoning", 1400),
        ("history", 1400),
        ("reflection", 1500),
    ],
)
def test_prompts_of_thirty_layers_are_short(
    smollm: Callable[[str], SearchContext], tmp_path: Path, strategy: str, most: int
) -> None:
    """Digits are tokens of their own in small vocabularies, other words about four characters."""
    for operator, text in last_prompts(smollm(strategy), tmp_path).items():
        digits = sum(x.isdigit() for x in text)
        signs = sum(not x.isalnum() and not x.isspace() for x in text)
        letters = sum(x.isalpha() for x in text)
        assert digits + signs + letters / 4 < most, (operator, digits, signs, letters)
