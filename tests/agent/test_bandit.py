"""The share of the LLM: a fixed one is even, a learned one finds the better arm and forgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.bandit import FLOOR, beliefs, draws_llm, improves, takes_turn
from agent.candidate import Candidate, Origin
from agent.graph import run_search

SLOTS = 12


def candidate(
    number: int, generation: int, origin: Origin, fitness: float, parents: tuple[int, ...] = ()
) -> Candidate:
    return Candidate(
        id=number,
        generation=generation,
        slot=number,
        operator="mutate",
        origin=origin,
        parents=parents,
        genotype=(),
        key=str(number),
        scores={"fitness": fitness},
        accuracy=None,
        speedup=None,
        tokens=100 if origin == "llm" else 0,
        seconds=0.0,
    )


def searched(
    rates: dict[str, float], generations: int, seed: int, after: list[Candidate] | None = None
) -> list[Candidate]:
    """Return a search whose proposals improve on their parent at these rates, by origin."""
    rng = np.random.default_rng(seed)
    known = list(after or [candidate(0, 0, "heuristic", 1000.0)])
    first = known[-1].generation + 1
    for generation in range(first, first + generations):
        parent = min(known, key=lambda x: x.fitness)
        for slot in range(SLOTS):
            asked = draws_llm(known, seed, generation, slot)
            origin: Origin = "llm" if asked else "classical"
            step = -1.0 if rng.random() < rates[origin] else 1.0
            fitness = parent.fitness + step * rng.random()
            known.append(candidate(len(known), generation, origin, fitness, (parent.id,)))
    return known


def llm_share(known: list[Candidate], since: int) -> float:
    asked = [x.origin == "llm" for x in known if x.generation >= since]
    return sum(asked) / len(asked)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.9, 1.0])
def test_a_fixed_share_is_spread_evenly(share: float) -> None:
    asked = [takes_turn(number, share) for number in range(1000)]
    for start, count in itertools.product(range(0, 900, 37), (1, 4, 12, 60)):
        assert abs(sum(asked[start : start + count]) - share * count) <= 1


@pytest.mark.parametrize("classical", [i / 20 for i in range(21)])
def test_a_fixed_share_is_the_rest_of_the_classical_one(classical: float) -> None:
    """The classical operator's turns are those at which its running count grows by one."""
    for number in range(2000):
        before, after = (int(x * classical + 1e-9) for x in (number, number + 1))
        assert takes_turn(number, 1 - classical) == (after == before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("better", ["llm", "classical"])
def test_the_better_arm_is_learned(better: str, seed: int) -> None:
    rates = {"llm": 0.1, "classical": 0.1, better: 0.6}
    share = llm_share(searched(rates, 30, seed), since=11)
    assert share > 0.75 if better == "llm" else share < 0.25


def test_equal_arms_are_both_asked() -> None:
    shares = [llm_share(searched({"llm": 0.3, "classical": 0.3}, 30, s), 1) for s in range(8)]
    assert 0.35 < np.mean(shares) < 0.65


@pytest.mark.parametrize(("rates", "least"), [((0.0, 1.0), "llm"), ((1.0, 0.0), "classical")])
def test_neither_arm_falls_below_the_floor(rates: tuple[float, float], least: str) -> None:
    known = searched(dict(zip(("llm", "classical"), rates, strict=True)), 40, 0)
    generation = known[-1].generation + 1
    asked = [draws_llm(known, seed, generation, 3) for seed in range(1500)]
    share = np.mean(asked) if least == "llm" else 1 - np.mean(asked)
    assert share == pytest.approx(FLOOR, abs=0.025)


def test_an_arm_that_becomes_better_is_found_again() -> None:
    turned = searched({"llm": 0.05, "classical": 0.6}, 40, 0)
    assert llm_share(turned, since=30) < 0.3
    after = searched({"llm": 0.6, "classical": 0.05}, 40, 0, after=turned)
    assert llm_share(after, since=70) > 0.7


def test_a_decision_depends_on_earlier_generations_and_the_seed_alone() -> None:
    known = searched({"llm": 0.5, "classical": 0.2}, 10, 0)
    for generation in (0, 1, 4, 9):
        before = [x for x in known if x.generation < generation]
        for slot in range(SLOTS):
            decisions = {
                draws_llm(x, 7, generation, slot)
                for x in (before, known, [*before, candidate(999, generation, "llm", -1e9)])
            }
            assert len(decisions) == 1
    drawn = [[draws_llm(known, seed, 10, slot) for slot in range(100)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    grown: list[Candidate] = []
    for x in known:  # a search that was cut anywhere goes on as it would have
        if x.generation:
            asked = draws_llm(grown, 0, x.generation, (x.id - 1) % SLOTS)
            assert asked == (x.origin == "llm")
        grown.append(x)


def test_a_proposal_improves_on_all_before_or_not_at_all() -> None:
    for fitness, parents, better in [(4.9, (1,), True), (5.0, (1,), False), (6.9, (1,), False)]:
        child = candidate(2, 1, "llm", fitness, parents)
        assert improves(child, best=5.0) == better
        assert not improves(replace(child, origin="fallback"), best=5.0)


def test_beliefs_count_improvements_and_forget_slowly() -> None:
    known = [
        candidate(0, 0, "heuristic", 5.0),
        candidate(1, 0, "llm", 4.0),
        candidate(2, 1, "llm", 3.0, (1,)),
        candidate(3, 1, "fallback", 2.0, (1,)),
        candidate(4, 1, "classical", 4.5, (0,)),
        candidate(5, 2, "classical", 6.0, (0,)),
    ]
    two = beliefs(known, 2)
    assert (two["llm"].successes, two["llm"].failures, two["llm"].tokens) == (1.0, 1.0, 50.0)
    assert (two["classical"].successes, two["classical"].failures) == (0.0, 1.0)
    three = beliefs(known, 3)
    assert three["classical"].successes == 0
    assert three["classical"].failures == pytest.approx(1.9)
    assert three["classical"].mean == pytest.approx(1 / 3.9)
    assert three["llm"].successes == pytest.approx(0.9)
    assert beliefs(known, 0) == beliefs(known, 1) == beliefs([], 7)


def test_tokens_decide_between_arms_that_are_equally_good() -> None:
    """Ten thousand rewards each make draws that mostly agree to 0.01; then tokens count."""
    known = [candidate(0, 0, "heuristic", 0.0)]
    for number in range(1, 20_001):
        origin: Origin = "llm" if number % 2 else "classical"
        fitness = -1.0 if number % 4 < 2 else 1.0
        known.append(candidate(number, 1, origin, fitness, (0,)))
    asked = [draws_llm(known, seed, 2, 0) for seed in range(40)]
    assert sum(asked) < 15
    free = [replace(x, tokens=7) for x in known]
    assert sum(draws_llm(free, seed, 2, 0) for seed in range(40)) > 25


def test_operators_of_a_generation_draw_apart(scene: Callable[..., Any], tmp_path: Path) -> None:
    """The n-th slot of a crossover and of a mutation are drawn for alone, and so are parents."""
    move = '{"moves":[{"block":"mlp","take_from":0,"give_to":1,"units":3}]}'
    context = scene(
        allocator="hybrid",
        llm_share="learned",
        population=4,
        crossover=4,
        mutate=4,
        evaluations=60,
        replies=[move],
    )
    run_search(context, tmp_path / "checkpoints.sqlite")
    asked = {(x.place.generation, x.place.slot) for x in context.driver.requests}
    last = context.ledger.candidates()[-1].generation
    same = [
        ((generation, n) in asked) == ((generation, n + 4) in asked)
        for generation in range(1, last + 1)
        for n in range(4)
    ]
    assert len(same) >= 24
    assert 0 < sum(same) < len(same)
