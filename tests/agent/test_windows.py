"""Windows: every generation on sequences of its own, compared through the first plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import agent.scoring
from agent.budget import Spending
from agent.graph import SearchResult, run_search
from agent.ledger import Ledger
from agent.racing import race
from agent.settings import RacingSettings
from agent.standing import leaders, ranked
from agent.state import SearchContext
from pruning.plan import Plan

Scene = Callable[..., SearchContext]
STAGES = RacingSettings(rounds=(0.3, 0.6, 1.0), bound=None, survivors=(4, 2))
MOVE = '{"moves":[{"block":"mlp","take_from":0,"give_to":1,"units":3}]}'


class Uneven:
    """The scene's fitness times a factor of the sequence, and noise of both; remembers calls."""

    def __init__(self, context: SearchContext, noise: float = 0.0) -> None:
        self._score, self._noise = context.score, noise
        self.calls: list[tuple[str, int]] = []

    def factor(self, sequence: int) -> float:
        return float(np.exp(np.random.default_rng(sequence).normal()))

    def luck(self, plan: Plan, sequence: int) -> float:
        key = (int(plan.key, 16) % 2**32, sequence)
        return 1 + self._noise * float(np.random.default_rng(key).normal())

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        self.calls += [(p.key, s) for p in plans for s in sequences]
        true = self._score(plans, [0])[:, :1]
        luck = np.array([[self.luck(p, s) for s in sequences] for p in plans])
        return true * np.array([self.factor(s) for s in sequences]) * luck


@pytest.fixture
def windowed(scene: Scene) -> Scene:
    def make(noise: float = 0.0, sequences: int = 10, **settings: Any) -> SearchContext:
        base = {"window": 3, "allocator": "genetic", "population": 4, "crossover": 2, "mutate": 2}
        context = scene(**{**base, **settings})
        return replace(context, score=Uneven(context, noise), sequences=range(20, 20 + sequences))

    return make


def run(context: SearchContext, folder: Path) -> SearchResult:
    return run_search(context, folder / "checkpoints.sqlite")


def calls(context: SearchContext) -> list[tuple[str, int]]:
    assert isinstance(context.score, Uneven)
    return context.score.calls


def test_generations_take_turns_through_all_sequences(windowed: Scene, tmp_path: Path) -> None:
    context = windowed()
    assert [context.window(g) for g in range(4)] == [
        [20, 21, 22],
        [23, 24, 25],
        [26, 27, 28],
        [29, 20, 21],
    ]
    run(context, tmp_path)
    by_key = {x.key: x.generation for x in context.ledger.candidates()}
    first = context.ledger.candidates()[0].key
    for key, sequence in calls(context):
        assert key == first or sequence in context.window(by_key[key])


def test_the_fitness_is_that_of_the_first_window_whatever_the_window(
    windowed: Scene, tmp_path: Path
) -> None:
    """Hard sequences make no plan worse: ratios to the first plan are exact without noise."""
    context = windowed()
    run(context, tmp_path)
    score = context.score
    assert isinstance(score, Uneven)
    level = np.mean([score.factor(s) for s in context.window(0)])
    for candidate in context.ledger.candidates():
        true = float(score._score([candidate.plan], [0])[0, 0])
        assert candidate.fitness == pytest.approx(true * level, rel=1e-6)


@pytest.mark.parametrize(
    "allocator", ["genetic", "evolution", "guided", "descent", "cma", "random"]
)
@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 6, 11, 40])
def test_the_limit_counts_the_first_plan_in_every_window(
    windowed: Scene, tmp_path: Path, allocator: str, evaluations: int
) -> None:
    context = windowed(allocator=allocator, evaluations=evaluations)
    result = run(context, tmp_path)
    assert len(calls(context)) == len(set(calls(context)))
    slopes = sum(x.charge for x in context.ledger.slopes())
    assert len(calls(context)) == 3 * (context.ledger.equivalents() - slopes)
    assert evaluations - 2 < result.equivalents <= evaluations
    assert result.stopped == "evaluations"
    if result.equivalents > 6:
        last = context.ledger.candidates()[-1].generation
        assert sum(x.generation == last for x in context.ledger.candidates()) <= 2


def test_the_last_plan_is_not_the_llms(windowed: Scene, tmp_path: Path) -> None:
    context = windowed(
        allocator="hybrid",
        operators="guided",
        replies=[MOVE],
        evaluations=22,
        sequences=100,
    )
    run(context, tmp_path)
    assert {"llm"} < {x.origin for x in context.ledger.candidates()}
    assert context.ledger.candidates()[-1].origin == "classical"


@pytest.mark.parametrize("allocator", ["guided", "descent"])
def test_a_killed_search_pays_no_window_twice(
    windowed: Scene, tmp_path: Path, allocator: str
) -> None:
    whole = windowed(allocator=allocator, folder=tmp_path / "whole", noise=0.1, slopes=1)
    (tmp_path / "whole").mkdir(exist_ok=True)
    run(whole, tmp_path / "whole")
    torn = windowed(allocator=allocator, folder=tmp_path / "torn", noise=0.1, slopes=1)
    (tmp_path / "torn").mkdir(exist_ok=True)
    honest = torn.score
    count = 0

    def dying(plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("killed")
        return honest(plans, sequences)

    with pytest.raises(RuntimeError, match="killed"):
        run(replace(torn, score=dying), tmp_path / "torn")
    assert isinstance(honest, Uneven)
    again = replace(torn, ledger=Ledger(tmp_path / "torn"))
    run(again, tmp_path / "torn")
    assert len(honest.calls) == len(set(honest.calls))
    names = ["candidates.jsonl", "anchors.jsonl"]
    for name in (*names, *(["slopes.jsonl"] if allocator == "descent" else [])):
        ours, theirs = (
            [
                {**json.loads(x), "seconds": 0}
                for x in (tmp_path / y / name).read_text().splitlines()
            ]
            for y in ("whole", "torn")
        )
        assert ours == theirs


def test_luck_in_one_window_does_not_make_the_best_plan(windowed: Scene, tmp_path: Path) -> None:
    """Noise as large as what plans differ by: standing is nearer to the truth than fitness."""
    gains = []
    for seed in range(6):
        (tmp_path / str(seed)).mkdir()
        context = windowed(
            allocator="guided",
            noise=0.2,
            seed=seed,
            evaluations=60,
            sequences=200,
            sensitive=False,
            folder=tmp_path / str(seed),
        )
        run(context, tmp_path / str(seed))
        score = context.score
        assert isinstance(score, Uneven)
        lucky, standing = context.ledger.best(1)[0], ranked(context, 1)[0]
        true = [float(score._score([x.plan], [0])[0, 0]) for x in (lucky, standing)]
        gains.append(true[0] - true[1])
    assert np.mean(gains) > 0


def test_leaders_are_known_after_every_generation(windowed: Scene, tmp_path: Path) -> None:
    context = windowed(allocator="guided", noise=0.1)
    result = run(context, tmp_path)
    numbers = sorted({x.generation for x in context.ledger.candidates()})
    assert [n for n, _ in result.leaders] == numbers
    assert all(x.generation <= n for n, x in result.leaders)
    assert result.leaders == tuple(leaders(context))
    assert result.leaders[-1][1] == result.best == result.finalists[0]
    assert result.lowest_fitness == min(x.fitness for x in context.ledger.candidates())


def test_the_first_plan_is_a_finalist_wherever_it_stands(windowed: Scene, tmp_path: Path) -> None:
    for noise in (0.0, 0.5):
        folder = tmp_path / str(noise)
        folder.mkdir()
        context = windowed(allocator="guided", noise=noise, folder=folder)
        found = run(context, folder).finalists
        assert sum(x.id == 0 for x in found) == 1
        assert list(found[:3]) == ranked(context, 3, complete=True)


def test_without_windows_candidates_stand_by_their_fitness(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="genetic")
    run_search(context, tmp_path / "checkpoints.sqlite")
    assert ranked(context, 5) == context.ledger.best(5)
    assert context.ledger.anchors() == []
    assert not (tmp_path / "anchors.jsonl").exists()


def test_a_race_within_a_window_is_run_against_the_first_plan(
    windowed: Scene, tmp_path: Path
) -> None:
    settings = RacingSettings(rounds=(0.4, 0.7, 1.0), bound=1.0)
    context = windowed(window=10, racing=settings, noise=0.02, evaluations=30)
    run(context, tmp_path)
    short = [x for x in context.ledger.candidates() if not x.is_complete]
    assert short
    complete = [x.fitness for x in context.ledger.candidates() if x.is_complete]
    assert min(x.fitness for x in short) >= min(complete)
    assert all(len(x.values) == 10 for x in context.ledger.anchors())


def test_the_first_plan_races_once_in_its_own_generation(
    windowed: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in the field it would count twice in the variance that all of them pool."""
    rivals: list[bool] = []

    def spied(*arguments: Any) -> list[NDArray[np.float64]]:
        rivals.append(arguments[-1] is not None)
        return race(*arguments)

    monkeypatch.setattr(agent.scoring, "race", spied)
    settings = RacingSettings(rounds=(0.4, 0.7, 1.0), bound=1.0)
    run(windowed(window=10, racing=settings, noise=0.02, evaluations=30), tmp_path)
    assert rivals == [False] + [True] * (len(rivals) - 1)
    assert len(rivals) > 2


@pytest.mark.parametrize("racing", [RacingSettings(bound=None), STAGES])
def test_evolution_meets_its_parent_on_the_sequences_of_each_generation(
    windowed: Scene, tmp_path: Path, racing: RacingSettings
) -> None:
    """The parent is replaced exactly where an offspring is better on what both have seen."""
    context = windowed(
        allocator="evolution", crossover=0, mutate=6, racing=racing, noise=0.1, evaluations=60
    )
    run(context, tmp_path)
    candidates, anchors = context.ledger.candidates(), context.ledger.anchors()
    assert len(anchors) > 5
    replaced = 0
    for anchor in anchors[1:]:
        parent = candidates[anchor.candidate]
        assert parent == ranked(context, 1, anchor.generation)[0]
        assert [(parent.key, s) in calls(context) for s in anchor.sequences] == [True] * 3
        offspring = [x for x in candidates if x.generation == anchor.generation]
        assert {x.parents for x in offspring} == {(parent.id,)}
        whole = [x for x in offspring if x.is_complete]
        ratios = [float(np.mean(x.values / np.array(anchor.values))) for x in whole]
        for child, ratio in zip(whole, ratios, strict=True):
            assert child.fitness == pytest.approx(parent.fitness * ratio, rel=1e-6)
        after = ranked(context, 1, anchor.generation + 1)[0]
        best = int(np.argmin(ratios))
        assert after.id == (whole[best].id if ratios[best] < 1 else parent.id)
        replaced += after.id != parent.id
    assert replaced > 2
    assert len(calls(context)) == len(set(calls(context)))


@pytest.mark.parametrize(
    "line",
    ['{"generation": 0}', "[]", '{"generation": 0, "sequences": [], "values": [], "scored": 0}'],
)
def test_a_broken_anchor_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "anchors.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"anchors.jsonl, line 1: not an anchor"):
        Ledger(tmp_path)


def test_places_left_are_those_of_a_generation(windowed: Scene) -> None:
    context = windowed(evaluations=20)
    spending = Spending.begin(context.settings, context.ledger, lambda: 0.0)
    assert spending.evaluations_left(0, 0) == 18
    assert spending.evaluations_left(1, 4) == 20 - 1 - 2 - 4
    assert not spending.is_last(1)
