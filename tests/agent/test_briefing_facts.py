"""What prompts can carry: every switch adds its fact and removes it; facts are true and past."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import briefing, facts, margins, trajectory
from agent.candidate import Candidate
from agent.graph import run_search
from agent.questions import Slot, parents_question, plan_question
from agent.state import SearchContext
from agent.view import View
from prompts import library
from pruning.architecture import Architecture
from pruning.budget import Budget, Times

MARKS = {
    "sensitivity": "mlp error",
    "model": "Model: Tiny-1M, 6 layers",
    "accuracy": "accuracy 50 %",
    "speedup": "speedup 1.25",
    "best": "Best so far: plan ",
    "worst": "Worst of the population: plan ",
    "failed": " -> ",
    "latency": "an attention unit takes 35.2 us, an MLP step takes 8.07 us",
    "remaining": "12 of 40 evaluations",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a strategy of a user, somewhere."""
    moves = Path(library.__file__).parent / "strategies" / "moves"
    path = Path(shutil.copytree(moves, tmp_path / "mine"))
    (path / "mutate.md").write_text("{parent}\n{facts}\n{example}")
    return path


def show(folder: Path, switches: tuple[str, ...], mutate: str | None = None) -> library.Strategy:
    """Switch facts on, the others off, and load the strategy."""
    path = folder / "strategy.yaml"
    text = re.sub(r"shows: .*", f"shows: [{', '.join(switches)}]", path.read_text())
    path.write_text(text)
    if mutate is not None:
        (folder / "mutate.md").write_text(mutate)
    return library.load_strategy(str(folder))


@pytest.fixture
def searched(scene: Callable[..., SearchContext], tmp_path: Path) -> SearchContext:
    """Return a context whose ledger has three generations of 28 candidates in all."""
    context = scene(allocator="evolution", evaluations=28)
    run_search(context, tmp_path / "checkpoints.sqlite")
    object.__setattr__(context, "unit_latency", (35.21, 8.074))
    replace_settings(context, evaluations=40, allocator="llm")
    return context


def replace_settings(context: SearchContext, **values: Any) -> None:
    object.__setattr__(context, "settings", context.settings.model_copy(update=values))


def view(context: SearchContext, generation: int = 3, **values: Any) -> View:
    parent = context.ledger.best(1, before=generation)[0]
    given = {"form": "moves", "base": briefing.levels(context, parent), "parents": (parent,)}
    return View(context, generation, **{**given, **values})


def prompt(context: SearchContext, strategy: library.Strategy) -> str:
    object.__setattr__(context, "strategy", strategy)
    slot = Slot(3, 4, "mutate", (context.ledger.best(1, before=3)[0],))
    return plan_question(context, slot).messages[1]["content"]


def test_every_switch_adds_and_removes_its_fact(searched: SearchContext, folder: Path) -> None:
    assert set(MARKS) == set(library.SHOWN)
    for number in range(len(MARKS) + 1):
        for switches in itertools.combinations(library.SHOWN, number):
            text = prompt(searched, show(folder, switches))
            assert {x for x, mark in MARKS.items() if mark in text} == set(switches)
            assert "\n\n" not in text


@pytest.mark.parametrize("name", library.FACTS)
def test_a_fact_can_stand_anywhere(searched: SearchContext, folder: Path, name: str) -> None:
    strategy = show(folder, (name,), f"{{parent}} <{{{name}}}> {{example}}")
    text = prompt(searched, strategy)
    value = facts.fact(view(searched), name)
    assert value
    assert f"<{value}>" in text


def test_vectors_are_told_as_vectors(searched: SearchContext, folder: Path) -> None:
    path = folder / "strategy.yaml"
    path.write_text(path.read_text().replace("mutate: moves", "mutate: vectors"))
    text = prompt(
        searched, show(folder, ("best", "worst"), "{parent}\n{facts}\n{history}{example}")
    )
    assert re.search(r'Best so far: plan \d+: fitness [\d.]+\n\{"attention":\[', text)
    assert len(re.findall(r"\]\}; fitness [\d.]+", text)) == 8


def test_best_and_worst_are_of_the_living(searched: SearchContext) -> None:
    pool = searched.ledger.best(searched.settings.population, before=3)
    assert facts.best(view(searched)).startswith(f"plan {pool[0].id}: fitness ")
    assert facts.worst(view(searched)).startswith(f"plan {pool[-1].id}: fitness ")
    assert facts.best(view(searched, parents=())).endswith("; no changes")


def test_remaining_names_every_limit_that_is_set(searched: SearchContext) -> None:
    assert facts.remaining(view(searched)) == "12 of 40 evaluations"
    assert facts.remaining(view(searched, generation=1)) == "32 of 40 evaluations"
    replace_settings(searched, calls=7, tokens=1_000_000, cost=0.5)
    assert facts.remaining(view(searched)) == (
        "12 of 40 evaluations, 7 of 7 calls, 1000000 of 1000000 tokens, 0.5 of 0.5 money"
    )


def test_latency_that_was_not_measured_is_said(searched: SearchContext) -> None:
    object.__setattr__(searched, "unit_latency", None)
    assert facts.latency(view(searched)) == "not measured"


def test_the_target_is_told_in_weights_where_time_is_limited(
    scene: Callable[..., SearchContext],
) -> None:
    context = scene()
    assert briefing.common(context)["target"] == "30"
    heads, channels = context.space.kept
    times = Times(0, tuple(1000 + 1000 * heads), tuple(1000 + 3000 * channels))
    timed = replace(context, budget=Budget.timed(times, context.space.layers, 1.2))
    assert timed.space.one_share == pytest.approx(0.75)  # 2000 + 4000 x is 6000 / 1.2
    assert briefing.common(timed)["target"] == "25"


def test_nothing_is_told_before_the_first_generation(searched: SearchContext) -> None:
    start = View(searched, 0, "moves", searched.first_plan)
    told = {name: facts.fact(start, name) for name in library.FACTS}
    assert {x for x, text in told.items() if text} == {"model", "latency", "remaining"}
    assert trajectory.history(start) == ""
    assert start.past == {}


def test_failed_changes_did_fail(searched: SearchContext) -> None:
    here = view(searched)
    lines = trajectory.failed(here).split("\n")
    assert len(lines) == 4
    tried = {}
    for candidate in here.past.values():
        before = here.origin_of(candidate)
        if before is not None:
            tried[trajectory.effect(here, candidate, before)] = (before, candidate)
    for line in lines:
        before, candidate = tried[line]
        assert candidate.fitness >= before.fitness
        assert line.endswith(f": {before.fitness:.4g} -> {candidate.fitness:.4g}")
    own = [tried[x][0] in here.parents for x in lines]
    assert own == sorted(own, reverse=True)
    assert any(own)


def test_history_rises_to_the_best_of_the_last(searched: SearchContext) -> None:
    here = view(searched)
    lines = trajectory.history(here).split("\n")
    fitness = [float(x.rpartition(" ")[2]) for x in lines]
    assert len(lines) == 8
    assert fitness == sorted(fitness, reverse=True)
    others = [x for x in here.past.values() if x not in here.parents]
    assert fitness == [float(f"{x.fitness:.4g}") for x in sorted(others[-8:], key=_worst_first)]


def _worst_first(candidate: Candidate) -> float:
    return -candidate.fitness


def test_the_current_generation_is_never_told(
    searched: SearchContext, scene: Callable[..., SearchContext]
) -> None:
    """A ledger that goes on until generation 2 tells generation 2 no more than one that ends."""
    short = scene(allocator="llm", evaluations=40)
    for candidate in searched.ledger.candidates():
        if candidate.generation < 2:
            short.ledger.add_candidate(candidate)
    parents = tuple(searched.ledger.best(2, before=2))
    for strategy in ("with_statistics", "reasoning", "history", "reflection"):
        asked = []
        for context in (searched, short):
            object.__setattr__(context, "strategy", library.load_strategy(strategy))
            object.__setattr__(context, "unit_latency", (1.0, 2.0))
            listed = context.ledger.best(5, before=2)
            slots = [Slot(2, 0, "crossover", parents), Slot(2, 5, "mutate", parents[1:])]
            asked.append([plan_question(context, x).messages for x in slots])
            asked[-1].append(parents_question(context, Slot(2, 12, "select"), listed, 3).messages)
        assert asked[0] == asked[1]


def test_margins_are_differences_of_the_errors(searched: SearchContext) -> None:
    levels = searched.first_plan
    take, give = margins.steps(searched, levels)
    for block, (low, high) in enumerate(searched.space.bounds):
        rises = np.full((len(levels), 2), np.nan)
        for i, pair in enumerate(levels):
            row, level = searched.sensitivity[i][block], pair[block]
            rises[i, 0] = row[level - 1] - row[level] if level > low else np.nan
            rises[i, 1] = row[level] - row[level + 1] if level < high else np.nan
        scaled = rises * 99 / np.nanmax(rises)
        np.testing.assert_allclose(take[:, block], scaled[:, 0], rtol=1e-12)
        np.testing.assert_allclose(give[:, block], scaled[:, 1], rtol=1e-12)
    rows = margins.margins(searched, levels).split("\n")
    assert rows[0] == "layer,attention,mlp,attention take,attention give,mlp take,mlp give"
    assert len(rows) == 7
    assert any("-" in x for x in rows[1:])  # layers that keep all their attention


def test_margins_survive_errors_that_are_not_finite(searched: SearchContext) -> None:
    broken = [[[np.nan, np.inf, -np.inf, 1.0], [np.nan] * 16] for _ in range(6)]
    object.__setattr__(searched, "sensitivity", broken)
    for teller in (margins.margins, margins.statistics):
        assert "nan" not in teller(searched, _even(searched))


def _even(context: SearchContext) -> list[tuple[int, int]]:
    return [(2, 8)] * context.space.layers


def test_statistics_name_groups_and_extremes(searched: SearchContext) -> None:
    lines = margins.statistics(searched, searched.first_plan).split("\n")
    assert [x.partition(":")[0] for x in lines] == [
        "early layers 0 to 1",
        "middle layers 2 to 3",
        "late layers 4 to 5",
        "cheapest attention to take",
        "attention worth most when given",
        "cheapest mlp to take",
        "mlp worth most when given",
    ]
    take, give = margins.steps(searched, searched.first_plan)
    assert lines[5].endswith(f"layers {' '.join(map(str, np.argsort(take[:, 1])[:4]))}")
    assert lines[6].endswith(f"layers {' '.join(map(str, np.argsort(-give[:, 1])[:4]))}")


def test_grids_with_gaps_are_told_as_they_are(scene: Callable[..., SearchContext]) -> None:
    """A target, or a table of times, may leave levels out: the LLM is told which there are."""
    context = scene(min_rate=0.0, max_rate=1.0)
    assert "Attention keeps 1 to 4 KV groups; an MLP" in briefing.common(context)["units"]
    grid = context.grid.keeping([0, 1, 3], [1, 5, 7, 11, 15])
    architecture = Architecture("llama", context.space.layers, 64, 8, 4, 8, 256, 100, True)
    budget = Budget.of(architecture, grid, "parameters", 0.7)
    told = briefing.common(replace(context, grid=grid, budget=budget))["units"]
    assert "Attention keeps one of 1, 2, 4 KV groups, one unit being one step" in told
    assert "an MLP keeps 1 to 5 steps of 51 channels" in told  # 256 / 5, on average
