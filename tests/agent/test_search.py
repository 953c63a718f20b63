"""Whole searches on an analytic score: budgets, determinism, resume, hostile drivers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import agent.graph
from agent.allocators import uniform
from agent.candidate import Candidate, Scores
from agent.cma import sampled_shares
from agent.drivers.driver import Completion, MayRetry, Request
from agent.graph import SearchResult, build_graph, picture, run_search
from agent.knapsack import knapsack
from agent.ledger import Ledger
from agent.projection import Levels
from agent.racing import NOT_FINITE
from agent.state import SearchContext
from prompts import library
from pruning.plan import Plan

Scene = Callable[..., SearchContext]

MOVES = [
    '{"moves":[{"block":"mlp","take_from":0,"give_to":1,"units":3}]}',
    '{"moves":[{"block":"mlp","take_from":2,"give_to":4,"units":2}]}',
    '{"moves":[{"block":"mlp","take_from":5,"give_to":3,"units":1}]}',
    '{"from_second":[0,2]}',
    '{"from_second":[1,3,5]}',
    '{"parents":[0,1,2]}',
]
HOSTILE = [
    "",
    "Certainly! I would prune the middle layers.",
    '{"moves":[{"block":"mlp","take_from":0,"give_to":1,"units":3}',
    '{"moves":[{"block":"mlp","take_from":0,"give_to":99,"units":3}]}',
    '{"moves":[{"block":"mlp","take_from":-1,"give_to":1,"units":' + "9" * 5000 + "}]}",
    '{"attention":[1,2],"mlp":[NaN]}',
    "[" * 19_000,
    '{"parents":[10000]}',
    '{"from_second":[]}',
]


def run(context: SearchContext, folder: Path, **options: Any) -> SearchResult:
    return run_search(context, folder / "checkpoints.sqlite", **options)


def without_seconds(ledger: Ledger) -> list[dict[str, Any]]:
    return [{**x.to_json(), "seconds": 0} for x in ledger.candidates()]


@pytest.mark.parametrize(
    "allocator", ["evolution", "genetic", "guided", "descent", "cma", "random", "random_seeded"]
)
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_classical_search_keeps_every_promise(
    scene: Scene, tmp_path: Path, allocator: str, granularity: str
) -> None:
    context = scene(allocator=allocator, granularity=granularity, evaluations=37)
    result = run(context, tmp_path)
    candidates = context.ledger.candidates()
    assert result.evaluations == len(candidates) <= 37
    assert len({x.key for x in candidates}) == len(candidates)
    assert [x.id for x in candidates] == list(range(len(candidates)))
    for candidate in candidates:
        levels = context.grid.levels(candidate.plan)
        assert context.budget.is_within(levels)
        assert context.budget.is_tight(levels)
        assert all(p < candidate.id for p in candidate.parents)
    assert result.best.fitness == min(x.fitness for x in candidates)
    assert candidates[0].origin == "heuristic"
    assert result.llm_calls == result.llm_tokens == result.fallbacks == 0
    assert [x.fitness for x in result.finalists[:3]] == sorted(x.fitness for x in candidates)[:3]
    assert candidates[0] in result.finalists


def test_the_limit_on_evaluations_is_met_exactly(scene: Scene, tmp_path: Path) -> None:
    for evaluations in (1, 5, 8, 9, 21):
        folder = tmp_path / str(evaluations)
        folder.mkdir()
        context = scene(evaluations=evaluations)
        result = run(context, folder)
        assert result.evaluations == evaluations == len(context.score.plans)  # type: ignore[attr-defined]
        assert result.stopped == "evaluations"


@pytest.mark.parametrize("allocator", ["uniform", "uniform_mlp", "heuristic", "knapsack"])
def test_allocators_without_search_score_one_plan(
    scene: Scene, tmp_path: Path, allocator: str
) -> None:
    result = run(scene(allocator=allocator), tmp_path)
    assert (result.evaluations, result.stopped) == (1, "no search")
    assert (result.best.operator, result.best.origin) == (allocator, "heuristic")
    assert result.best.accuracy == 0.5


def test_evolution_beats_random_at_equal_evaluations(scene: Scene, tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"evolution": [], "random": []}
    for allocator, seed in [(a, s) for a in best for s in range(5)]:
        folder = tmp_path / f"{allocator}{seed}"
        folder.mkdir()
        context = scene(allocator=allocator, seed=seed, evaluations=80, seed_plan=False)
        best[allocator].append(run(context, folder).best.fitness)
    assert np.mean(best["evolution"]) < 0.95 * np.mean(best["random"])
    wins = sum(e < r for e, r in zip(best["evolution"], best["random"], strict=True))
    assert wins >= 4


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_the_optimum(scene: Scene, tmp_path: Path, seed: int) -> None:
    """The fitness is a sum over blocks, whose best plan the knapsack finds exactly."""
    context = scene(seed=seed, evaluations=2500, mutate=16, seed_plan=False)
    best = context.grid.plan(knapsack(context.space, context.sensitivity))
    lowest = float(context.score([best], context.sequences).mean())
    assert run(context, tmp_path).best.fitness == pytest.approx(lowest, rel=1e-6)


def test_parents_of_a_genetic_search_are_half_of_its_population(
    scene: Scene, tmp_path: Path
) -> None:
    """How many plans a prompt would list has no part in a search without prompts."""
    context = scene(allocator="genetic", population=10, shown=2, crossover=8, mutate=8)
    run(context, tmp_path)
    later = [x for x in context.ledger.candidates() if x.generation > 0]
    for generation in {x.generation for x in later}:
        found = {p for x in later if x.generation == generation for p in x.parents}
        assert 2 < len(found) <= 5


def test_a_search_begins_with_the_simple_plans_that_are_named(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="genetic", starts=("uniform_mlp", "uniform", "heuristic"))
    run(context, tmp_path)
    first = [x for x in context.ledger.candidates() if x.generation == 0]
    wanted = [context.first_plan, *(context.simple_plan(x) for x in ("uniform_mlp", "uniform"))]
    assert [context.grid.levels(x.plan) for x in first[:3]] == wanted  # the heuristic one, once
    assert [x.origin for x in first] == ["heuristic"] * 3 + ["classical"] * 5


def test_evolution_has_one_parent_and_genetic_several(scene: Scene, tmp_path: Path) -> None:
    for allocator, operators in (("evolution", {"mutate"}), ("genetic", {"crossover", "mutate"})):
        (tmp_path / allocator).mkdir()
        context = scene(allocator=allocator)
        run(context, tmp_path / allocator)
        later = [x for x in context.ledger.candidates() if x.generation > 0]
        assert {x.operator for x in later} == operators
        for generation in {x.generation for x in later}:
            best = context.ledger.best(1, before=generation)[0].id
            parents = {x.parents for x in later if x.generation == generation}
            assert (parents == {(best,)}) == (allocator == "evolution")


def test_seeded_random_plans_descend_from_none(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="random_seeded", evaluations=30)
    run(context, tmp_path)
    assert {x.parents for x in context.ledger.candidates()} == {()}
    seed, *others = context.ledger.candidates()
    gaps = [np.abs(np.subtract(x.genotype, seed.genotype)[:, 2]).sum() for x in others]
    wild = scene(allocator="random", evaluations=30)
    (tmp_path / "wild").mkdir()
    run(wild, tmp_path / "wild")
    _, *drawn = wild.ledger.candidates()
    far = [np.abs(np.subtract(x.genotype, seed.genotype)[:, 2]).sum() for x in drawn]
    assert np.mean(gaps) < np.mean(far)


def test_searches_learn_what_cut_errors_do_not_tell(scene: Scene, tmp_path: Path) -> None:
    """From cut errors that know no layer: nearer to the optimum than a genetic search."""
    best: dict[str, list[float]] = {"guided": [], "genetic": [], "descent": []}
    for allocator, seed in [(a, s) for a in best for s in range(4)]:
        folder = tmp_path / f"{allocator}-{seed}"
        folder.mkdir()
        context = scene(allocator=allocator, seed=seed, sensitive=False, evaluations=40, slopes=1)
        result = run(context, folder)
        best[allocator].append(result.best.fitness / context.ledger.candidates()[0].fitness)
    assert max(best["guided"]) < 0.9
    assert np.mean(best["guided"]) < np.mean(best["genetic"])
    assert np.mean(best["descent"]) < np.mean(best["genetic"])


def test_plans_handed_in_are_scored_first(scene: Scene, tmp_path: Path) -> None:
    context = scene(evaluations=9)
    even = context.grid.plan(uniform(context.space))
    context = replace(context, starts=(even, context.grid.plan(context.first_plan), even))
    run(context, tmp_path)
    first, second, third = context.ledger.candidates()[:3]
    assert (first.plan, second.plan) == (context.grid.plan(context.first_plan), even)
    assert (second.origin, third.origin) == ("heuristic", "classical")


def test_a_plan_handed_in_is_scored_where_slots_are_few(scene: Scene, tmp_path: Path) -> None:
    """Also beside simple plans of which two are the same, and where there is a single slot."""
    for population, starts in ((1, ()), (3, ("heuristic", "uniform"))):
        folder = tmp_path / str(population)
        folder.mkdir()
        context = scene(evaluations=4, population=population, starts=starts, folder=folder)
        handed = context.grid.plan(_lopsided(context))
        context = replace(context, starts=(handed,))
        run(context, folder)
        begun = [x for x in context.ledger.candidates() if x.generation == 0]
        assert len(begun) == population
        assert handed in {x.plan for x in begun}


def test_plans_handed_in_have_one_rate_a_layer_where_that_is_asked(
    scene: Scene, tmp_path: Path
) -> None:
    context = scene(granularity="layer", evaluations=9)
    levels = _lopsided(context)
    assert context.conform(levels) != levels
    context = replace(context, starts=(context.grid.plan(levels),))
    run(context, tmp_path)
    assert context.ledger.candidates()[1].plan == context.grid.plan(context.conform(levels))


def _lopsided(context: SearchContext) -> Levels:
    """Return the plan whose first layers keep all of the one block, the last all of the other."""
    shares = [[1.0, 0.4]] * 3 + [[0.25, 1.0]] * 3
    return context.space.project(shares)


def test_cma_gets_better_than_where_it_began(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="cma", evaluations=200, sensitive=False)
    result = run(context, tmp_path)
    began = context.ledger.best(1, before=1)[0].fitness
    assert result.best.fitness < 0.9 * began
    assert result.best.generation > 1


def test_cma_is_told_of_its_own_samples_only(scene: Scene, tmp_path: Path) -> None:
    """In a hybrid search a slot that the LLM filled says nothing of the sample of that slot."""
    own, mixed = (
        scene(allocator="hybrid", operators="cma", folder=tmp_path / x) for x in ("own", "mixed")
    )
    run(scene(allocator="cma", evaluations=20, folder=tmp_path / "cma"), tmp_path)
    for candidate in Ledger(tmp_path / "cma").candidates():
        if (candidate.generation, candidate.slot) != (1, 3):
            own.ledger.add_candidate(candidate)
            mixed.ledger.add_candidate(candidate)
            continue
        lucky: Scores = {"fitness": -1.0, "stderr": 0.0, "sequences": 4}
        mixed.ledger.add_candidate(replace(candidate, origin="llm", scores=lucky))
    assert len(mixed.ledger.candidates()) == len(own.ledger.candidates()) + 1
    assert (sampled_shares(mixed, 2, 0) == sampled_shares(own, 2, 0)).all()


def test_the_best_of_each_generation_is_assessed(scene: Scene, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    context = scene(evaluations=32)
    result = run(context, tmp_path, on_event=events.append)
    groups: dict[int, list[Candidate]] = {}
    for candidate in context.ledger.candidates():
        groups.setdefault(candidate.generation, []).append(candidate)
    assert len(groups) == 3
    for generation, members in groups.items():
        best = min(members, key=lambda x: x.fitness)
        assert [x.id for x in members if x.accuracy is not None] == [best.id]
        line = {"generation": generation, "best_fitness": best.fitness}
        assert result.generations[generation] == {**line, "accuracy": 0.5, "speedup": 1.25}
    assert Counter(x["kind"] for x in events) == {"candidate": 32, "generation": 3}
    bests = [x["best"] for x in events if x["kind"] == "candidate"]
    assert bests == sorted(bests, reverse=True)


@pytest.mark.parametrize("settings", [{"allocator": "evolution"}, {"allocator": "llm"}])
def test_equal_seeds_give_equal_ledgers(
    scene: Scene, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ledgers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        context = scene(seed=seed, replies=MOVES, folder=tmp_path / name, **settings)
        run(context, tmp_path / name)
        ledgers.append(without_seconds(context.ledger))
    assert ledgers[0] == ledgers[1]
    assert ledgers[0] != ledgers[2]


@pytest.mark.parametrize("strategy", ["moves", "paper"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_a_hostile_driver_costs_fallbacks_and_nothing_else(
    scene: Scene, tmp_path: Path, strategy: str, granularity: str
) -> None:
    context = scene(
        allocator="llm", replies=HOSTILE, strategy=strategy, granularity=granularity, seed=3
    )
    result = run(context, tmp_path)
    assert result.evaluations == 40
    assert result.origins == {"fallback": 39, "heuristic": 1}
    assert result.fallbacks == 39
    lines = context.ledger.lines()
    assert {x.attempt for x in lines} == {0, 1}
    assert all(x.outcome.startswith("invalid: ") for x in lines)
    assert result.llm_calls == len(lines)
    assert result.llm_tokens == sum(x.tokens for x in lines)


def test_good_replies_become_candidates(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="llm", replies=MOVES)
    result = run(context, tmp_path)
    assert result.origins["llm"] + result.origins.get("llm_repaired", 0) >= 3
    made = [x for x in context.ledger.candidates() if x.origin == "llm"]
    assert all(x.tokens > 0 for x in made)
    accepted = [x for x in context.ledger.lines() if x.outcome == "accepted"]
    assert {x.operator for x in accepted} >= {"generate", "mutate"}


def test_vectors_of_the_paper_are_projected(scene: Scene, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    replies = [
        json.dumps(
            {"attention": rng.integers(0, 90, 6).tolist(), "mlp": rng.integers(0, 90, 6).tolist()}
        )
        for _ in range(50)
    ]
    context = scene(allocator="llm", replies=replies, strategy="paper", evaluations=8)
    assert run(context, tmp_path).origins == {"heuristic": 1, "llm": 7}


def test_repair_sees_the_error_and_is_labelled(scene: Scene, tmp_path: Path) -> None:
    context = scene(
        allocator="llm",
        evaluations=2,
        replies=['{"moves":[{"block":"mlp","take_from":2,"give_to":2,"units":1}]}', MOVES[0]],
    )
    result = run(context, tmp_path)
    assert result.origins == {"heuristic": 1, "llm_repaired": 1}
    first, second = context.driver.requests  # type: ignore[union-attr]
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[:2] == first.messages
    assert "take_from and give_to are both 2" in second.messages[3]["content"]
    assert first.seed != second.seed


def test_a_repair_may_show_a_tiny_reply(scene: Scene, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(Path(library.__file__).parent / "strategies/moves", tmp_path / "m"))
    (mine / "repair.md").write_text("{error} Such as {example}")
    replies = ["no", MOVES[0]]
    context = scene(allocator="llm", evaluations=2, replies=replies, strategy=str(mine))
    run(context, tmp_path)
    told = context.driver.requests[1].messages[3]["content"]  # type: ignore[union-attr]
    assert '"take_from"' in told.partition("Such as ")[2]


def test_moves_go_as_far_as_the_layers_allow(scene: Scene, tmp_path: Path) -> None:
    """Layer 3 has room for two more steps only, and the attention of layer 0 is full."""
    far = {"block": "mlp", "take_from": 0, "give_to": 3, "units": 8}
    full = {"block": "attention", "take_from": 5, "give_to": 0, "units": 1}
    replies = [json.dumps({"moves": x}) for x in ([far, full], [full])]
    context = scene(allocator="llm", evaluations=3, replies=replies)
    first = context.first_plan
    assert (first[0], first[3], context.space.bounds) == ((3, 8), (3, 13), ((0, 3), (1, 15)))
    run(context, tmp_path)
    made = context.grid.levels(context.ledger.candidates()[1].plan)
    assert made == [(3, 6), *first[1:3], (3, 15), *first[4:]]
    message = "invalid: None of the moves is possible: attention 0 already keeps the most."
    assert context.ledger.lines()[1].outcome == message


def test_duplicates_are_replaced_and_counted(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="llm", evaluations=8, replies=[MOVES[0]])
    result = run(context, tmp_path)
    assert result.origins == {"heuristic": 1, "llm": 1, "fallback": 6}
    assert {x.outcome for x in context.ledger.lines()} == {"accepted"}
    assert (result.duplicates, len(context.ledger.lines())) == (6, 7)
    assert context.driver.batches == [7]  # type: ignore[union-attr]


def test_the_classical_share_is_not_asked(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="hybrid", evaluations=8, replies=HOSTILE, llm_share=0.5)
    assert run(context, tmp_path).origins == {"heuristic": 1, "fallback": 3, "classical": 4}
    whole = scene(allocator="hybrid", replies=HOSTILE, llm_share=0.0)
    (tmp_path / "whole").mkdir()
    assert run(whole, tmp_path / "whole").llm_calls == 0


@pytest.mark.parametrize("brood", [(1, 0), (1, 4), (5, 8)])
def test_the_share_is_that_of_all_plans(
    scene: Scene, tmp_path: Path, brood: tuple[int, int]
) -> None:
    """Not rounded up in every generation, however small those are."""
    crossover, mutate = brood
    context = scene(
        allocator="hybrid",
        evaluations=120,
        replies=HOSTILE,
        llm_share=0.3,
        crossover=crossover,
        mutate=mutate,
    )
    origins = run(context, tmp_path).origins
    assert origins["fallback"] / (origins["fallback"] + origins["classical"]) == pytest.approx(
        0.3, abs=0.02
    )


@pytest.mark.parametrize(
    ("limit", "value"),
    [("tokens", 0), ("tokens", 1500), ("tokens", 4000), ("calls", 0), ("calls", 9), ("cost", 0.01)],
)
def test_a_limit_on_the_llm_is_never_passed_and_ends_the_search(
    scene: Scene, tmp_path: Path, limit: str, value: float
) -> None:
    context = scene(allocator="llm", replies=MOVES, price=5.0, **{limit: value})
    result = run(context, tmp_path)
    assert getattr(result, f"llm_{limit}") <= value
    assert result.stopped == limit
    assert 1 <= result.evaluations < 40
    assert (result.llm_calls == 0) == (value == 0)
    skipped = [x for x in context.ledger.lines() if x.is_skipped]
    assert {x.outcome for x in skipped} == {f"skipped: search.{limit}"}
    assert all(x.reply is None for x in skipped)


def test_a_limit_without_a_seed_plan_leaves_one_plan(scene: Scene, tmp_path: Path) -> None:
    result = run(scene(allocator="llm", replies=MOVES, tokens=0, seed_plan=False), tmp_path)
    assert (result.evaluations, result.stopped, result.best.origin) == (1, "tokens", "heuristic")


def test_one_parent_named_often_gets_the_best_other_one(scene: Scene, tmp_path: Path) -> None:
    replies = [*MOVES[:3], '{"parents":[2,2,2]}', '{"from_second":[0,1,2]}']
    context = scene(
        allocator="llm", replies=replies, population=4, crossover=1, mutate=0, evaluations=5
    )
    run(context, tmp_path)
    best = next(x for x in context.ledger.best(4, before=1) if x.id != 2)
    (child,) = (x for x in context.ledger.candidates() if x.generation == 1)
    assert sorted(child.parents) == sorted((2, best.id))


@pytest.mark.parametrize("limit", range(8, 16))
def test_a_limit_holds_where_a_generation_selects_and_generates(
    scene: Scene, tmp_path: Path, limit: int
) -> None:
    """Random operators have no parents once a selection fails: mutation then asks as generation."""
    context = scene(allocator="llm", operators="random", replies=["nothing"], mutate=6, calls=limit)
    run(context, tmp_path)
    made = [x for x in context.ledger.lines() if not x.is_skipped]
    assert {x.operator for x in made if x.generation == 1} <= {"select", "generate", "crossover"}
    assert len(made) <= limit


def test_the_limit_on_seconds_ends_the_search(scene: Scene, tmp_path: Path) -> None:
    result = run(scene(seconds=1.5, evaluations=1000), tmp_path)
    assert result.stopped == "seconds"
    assert result.evaluations == 8


def test_the_time_of_a_stopped_search_counts(scene: Scene, tmp_path: Path) -> None:
    """Also that of the generation which was scored and not yet recorded."""
    whole = scene(evaluations=20, folder=tmp_path)
    scored: list[int] = []

    def score(plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        scored.append(len(plans))
        return whole.score(plans, sequences)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "candidate":
            raise KeyboardInterrupt

    first = replace(whole, score=score, clock=lambda: 100.0 * len(scored))
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path, on_event=stop)
    spent = 100.0 * len(scored)
    assert spent > 0
    again = replace(whole, ledger=Ledger(tmp_path), clock=lambda: 7.0)
    assert run(again, tmp_path).seconds == spent


def test_a_call_that_is_too_late_is_skipped_for_the_time_it_lacks(
    scene: Scene, tmp_path: Path
) -> None:
    """Nothing stays set aside for it that could make another limit seem reached."""
    late: list[bool] = []

    class Failing:
        def complete(
            self, requests: Sequence[Request], may_retry: MayRetry
        ) -> Iterator[Completion]:
            for number in range(len(requests)):
                yield Completion(number, None, 10, 0, 0.0, "fake", failure="reset")
                late.append(True)
                assert not may_retry(number)

        def close(self) -> None:
            pass

    context = scene(
        allocator="llm", replies=[], population=1, seed_plan=False, seconds=60.0, calls=2
    )
    context = replace(context, driver=Failing(), clock=lambda: 100.0 * len(late))
    result = run(context, tmp_path)
    assert [x.outcome for x in context.ledger.lines()] == [
        "failed: reset",
        "skipped: search.seconds",
    ]
    assert result.stopped == "seconds"


def test_llm_needs_a_driver(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"search\.allocator: llm needs a driver"):
        run(scene(allocator="llm"), tmp_path)


def test_a_tiny_space_ends_when_no_new_plan_is_left(scene: Scene, tmp_path: Path) -> None:
    context = scene(evaluations=1000, min_rate=0.3, max_rate=0.3)
    result = run(context, tmp_path)
    assert result.stopped == "no new plans"
    assert 1 <= result.evaluations < 1000


def test_a_score_that_is_not_finite_is_the_worst(scene: Scene, tmp_path: Path) -> None:
    context = scene(evaluations=16)
    inner = context.score
    calls = []

    def score(plans: Any, sequences: Any) -> Any:
        table = inner(plans, sequences)
        calls.append(len(plans))
        table[0] = np.nan if len(calls) == 1 else np.inf
        return table

    object.__setattr__(context, "score", score)
    result = run(context, tmp_path)
    assert result.best.fitness < 1e6
    assert sum(x.fitness == NOT_FINITE for x in context.ledger.candidates()) == 2
    text = (tmp_path / "run0" / "candidates.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_score_of_the_wrong_shape_is_refused(scene: Scene, tmp_path: Path) -> None:
    context = scene()
    object.__setattr__(context, "score", lambda plans, _: np.zeros((len(plans), 1)))
    with pytest.raises(ValueError, match=r"score: got shape \(8, 1\), want \(8, 4\)"):
        run(context, tmp_path)


class Stop:
    """Raises KeyboardInterrupt in the call after `calls` calls."""

    def __init__(self, inner: Callable[..., Any], calls: int) -> None:
        self.inner, self.left = inner, calls

    def __call__(self, *args: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.inner(*args)


@pytest.mark.parametrize("place", ["score", "assess", "driver", "on_event"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_interrupted_search_resumes_to_the_same_end(
    scene: Scene, tmp_path: Path, place: str, calls: int
) -> None:
    whole = scene(allocator="llm", replies=MOVES, folder=tmp_path / "whole")
    expected = run(whole, tmp_path / "whole")

    folder = tmp_path / "cut"
    first = scene(allocator="llm", replies=MOVES, folder=folder)
    assert first.driver is not None
    options = {}
    if place == "driver":
        object.__setattr__(first.driver, "complete", Stop(first.driver.complete, calls))
    elif place == "on_event":
        options["on_event"] = Stop(lambda _: None, 9 * calls)
    else:
        object.__setattr__(first, place, Stop(getattr(first, place), calls))
    with pytest.raises(KeyboardInterrupt):
        run(first, folder, **options)
    scored = len(first.ledger.candidates())

    second = scene(allocator="llm", replies=MOVES, folder=folder)
    assert second.ledger.candidates() == first.ledger.candidates()
    answered = len(first.driver.requests)  # type: ignore[attr-defined]
    second.driver.requests.extend([None] * answered)  # type: ignore[union-attr]
    result = run(second, folder)
    assert without_seconds(second.ledger) == without_seconds(whole.ledger)
    assert result.best.key == expected.best.key
    assert result.llm_calls == expected.llm_calls
    assert len(second.ledger.candidates()) >= scored


def test_a_finished_search_is_not_run_again(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(scene(folder=folder), folder)
    again = scene(folder=folder)
    result = run(again, folder)
    assert result.best == first.best
    assert again.score.plans == []  # type: ignore[attr-defined]


def test_the_graph_reads_as_the_workflow() -> None:
    edges = {(x.source, x.target) for x in build_graph().compile().get_graph().edges}
    assert edges == {
        ("__start__", "generate"),
        ("generate", "evaluate"),
        ("evaluate", "record"),
        ("record", "select"),
        ("record", "__end__"),
        ("select", "crossover"),
        ("crossover", "mutate"),
        ("mutate", "evaluate"),
    }


def test_the_search_core_does_not_load_torch() -> None:
    code = (
        "import sys, agent.graph, agent.allocators, agent.ledger, prompts.library;"
        "bad = {'torch', 'transformers', 'xgrammar', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_picture_in_the_readme_is_the_graph() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{picture()}\n```" in readme


def test_langgraph_dev_finds_the_graph() -> None:
    house = Path(__file__).parents[2]
    named = json.loads((house / "langgraph.json").read_text())["graphs"]["search"]
    file, _, name = named.partition(":")
    assert (house / file).resolve() == Path(str(agent.graph.__file__)).resolve()
    compiled = getattr(agent.graph, name)()
    assert compiled.checkpointer is None
    assert set(compiled.nodes) > {"generate", "evaluate", "record", "select"}
