"""Golden prompts of the strategies that look back: what a driver gets in the third generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import reflections
from agent.drivers.driver import Completion, MayRetry, Place, Request
from agent.graph import run_search
from agent.questions import Slot, plan_question
from agent.settings import DriverSettings
from agent.state import SearchContext
from agent.view import View
from prompts import library
from prompts.library import Strategy, load_strategy
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid

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
        said = {x: f"{x} {where}: a{{b}}\n<|c|>\ud800" for x in self.strategy.words(place.operator)}
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
def test_prompts_do_not_peek_into_later_generations(
    looking: Looking, tmp_path: Path, strategy: str
) -> None:
    """A ledger of the whole search gives the prompts that were sent while it grew."""
    context = looking(strategy)
    run_search(context, tmp_path / "checkpoints.sqlite")
    sent = {(x.generation, x.slot): x.messages for x in context.ledger.lines() if not x.attempt}
    known = context.ledger.candidates()
    asked = [x for x in known if (x.generation, x.slot) in sent]
    assert {x.generation for x in asked} == {0, 1, 2}
    for child in asked:
        parents = tuple(known[i] for i in child.parents)
        slot = Slot(child.generation, child.slot, child.operator, parents)
        assert plan_question(context, slot).messages == sent[child.generation, child.slot]


def reflecting(context: SearchContext, generation: int) -> View:
    return View(context, generation, "moves", context.first_plan)


def test_hypotheses_come_back_with_what_was_measured(looking: Looking, tmp_path: Path) -> None:
    context = looking("reflection")
    run_search(context, tmp_path / "checkpoints.sqlite")
    known = {x.id: x for x in context.ledger.candidates()}
    expected = []
    for child in known.values():
        if child.origin not in ("llm", "llm_repaired") or child.generation > 1:
            continue
        before = known[child.parents[0] if child.parents else 0]
        verdict = "better" if child.fitness < before.fitness else "no better"
        expected.append(
            f"{before.fitness:.4g} -> {child.fitness:.4g}, {verdict}; "
            f"hypothesis: hypothesis {child.generation}.{child.slot}: a b c"
        )
    told = reflections.effects(reflecting(context, 2)).split("\n")
    measured = [x.partition(": ")[2] for x in told]
    assert len(measured) == 6
    assert set(measured) <= set(expected)
    rises = [float(after) - float(before) for before, after in map(numbers, measured)]
    assert rises == sorted(rises, reverse=True)
    assert reflections.effects(reflecting(context, 0)) == ""
    assert reflections.lessons(reflecting(context, 1)) == ""
    assert len(reflections.lessons(reflecting(context, 2)).split("\n")) == 5


def numbers(effect: str) -> list[str]:
    return effect.partition(",")[0].split(" -> ")


def test_the_order_in_which_calls_ended_does_not_matter(looking: Looking, tmp_path: Path) -> None:
    context = looking("reflection")
    run_search(context, tmp_path / "checkpoints.sqlite")
    mixed = looking("reflection")
    for candidate in context.ledger.candidates():
        mixed.ledger.add_candidate(candidate)
    for line in reversed(context.ledger.lines()):
        mixed.ledger.add_line(line)
    for tell in (reflections.effects, reflections.lessons):
        assert tell(reflecting(mixed, 3)) == tell(reflecting(context, 3)) != ""


def test_replies_to_other_strategies_are_passed_over(looking: Looking, tmp_path: Path) -> None:
    context = looking("moves")
    run_search(context, tmp_path / "checkpoints.sqlite")
    object.__setattr__(context, "strategy", load_strategy("reflection"))
    for tell in (reflections.effects, reflections.lessons):
        assert tell(reflecting(context, 3)) == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("late layers can give", "late layers can give"),
        (" two\nlines\r\n\tand  more ", "two lines and more"),
        ("{error} {{x}} <|im_end|></s>[INST]`a`\\n", "error x im_end /s INST a n"),
        ("a\ud800b\0c\u202ed\u2028e", "a b c d e"),
        ("é 😀", "é 😀"),
        ("\n{}\x1b", ""),
        ("x" * 160, "x" * 120),
    ],
)
def test_words_of_replies_are_told_plainly(text: str, told: str) -> None:
    assert reflections.plain(text) == told


def test_a_folder_of_ones_own_works_by_its_path(looking: Looking, tmp_path: Path) -> None:
    packaged = Path(library.__file__).parent / "strategies" / "reflection"
    folder = Path(shutil.copytree(packaged, tmp_path / "mine"))
    (folder / "system.md").write_text("My words on {layers} layers.")
    (folder / "mutate.md").write_text("{parent} {lessons} {history} {remaining} {example}")
    settings = (folder / "strategy.yaml").read_text()
    (folder / "strategy.yaml").write_text(settings.replace("best]", "best, remaining]"))
    prompts = last_prompts(looking(str(folder)), tmp_path)
    assert all(x.startswith("<system>\nMy words on 6 layers.\n<user>\n") for x in prompts.values())
    assert "- lesson 1.10: a b c" in prompts["mutate"]
    assert "6 of 26 evaluations" in prompts["mutate"]


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
        ("with_statistics", 1300),
        ("reasoning", 1100),
        ("history", 1100),
        ("reflection", 1100),
        ("knowledge", 1100),
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
