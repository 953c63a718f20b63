"""Racing: exact where it may not drop anybody, and hardly ever wrong where it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.graph import SearchResult, run_search
from agent.racing import NOT_FINITE, Floats, race, stops
from agent.racing_replay import replay
from agent.scoring import summaries
from agent.settings import RacingSettings
from agent.state import SearchContext
from pruning.plan import Plan

Scene = Callable[..., SearchContext]

OFF = RacingSettings(bound=None)
DOUBLING = (0.125, 0.25, 0.5, 1.0)
ON = RacingSettings(rounds=DOUBLING, bound=3.0)


class Table:
    """Recorded values; counts the pairs of plan and sequence that are asked for."""

    def __init__(self, values_PS: Floats) -> None:
        self.values, self.pairs = values_PS, 0

    def __call__(self, plans: Sequence[int], columns: range) -> Floats:
        self.pairs += len(plans) * len(columns)
        return self.values[np.ix_(list(plans), list(columns))]


def raced(values_PS: Floats, settings: RacingSettings, **options: Any) -> list[Floats]:
    return race(
        Table(values_PS), [np.array([])] * len(values_PS), values_PS.shape[1], settings, **options
    )


def simulated(
    rng: np.random.Generator, num_sequences: int, noise: float, *, heavy: bool
) -> Iterator[Floats]:
    """Yield generations of 12 plans of which one in ten is ruined: quality times difficulty.

    What a plan loses on a sequence is its quality times the difficulty of the sequence, which all
    plans share, times noise of its own.
    """
    difficulty, best = np.exp(0.3 * rng.standard_normal(num_sequences)), 1.0
    for _ in range(8):
        quality = best * (0.99 + 0.04 * np.abs(rng.standard_normal(12)))
        quality *= np.where(rng.random(12) < 0.1, 1 + rng.exponential(0.5, 12), 1)
        shape = 12, num_sequences
        own = rng.standard_t(3, shape) / 3**0.5 if heavy else rng.standard_normal(shape)
        yield quality[:, None] * difficulty * np.exp(noise * own)
        best = min(best, quality.min())


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("num_sequences", [8, 32, 128])
def test_the_best_plan_survives(num_sequences: int, noise: float, heavy: bool) -> None:
    """It is that of scoring everything, or one within 1 %: the best one has a fitness of about 1.

    A best plan that was lost once counts in all generations until a better one comes.
    """
    rng = np.random.default_rng(7)
    runs = [list(simulated(rng, num_sequences, noise, heavy=heavy)) for _ in range(25)]
    replays = [replay(x, ON) for x in runs]
    assert np.mean([loss <= 0.01 for x in replays for loss in x.losses]) >= 0.95
    assert np.mean([x.agreement for x in replays]) >= 0.9
    assert np.mean([x.losses[-1] for x in replays]) <= 0.002
    assert np.mean([x.share for x in replays]) <= 0.9


def test_without_a_bound_all_is_scored() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, 16))
    np.testing.assert_array_equal(raced(table, OFF), table)
    wide = RacingSettings(rounds=DOUBLING, bound=1e9)
    np.testing.assert_array_equal(raced(table, wide), table)
    assert stops(16, OFF) == [16]
    report = replay([table], OFF)
    assert (report.share, report.agreement, report.losses) == (1.0, 1.0, (0.0,))


@pytest.mark.parametrize(
    ("num_sequences", "expected"),
    [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (8, [1, 2, 4, 8]), (100, [13, 25, 50, 100])],
)
def test_every_round_brings_a_new_sequence(num_sequences: int, expected: list[int]) -> None:
    assert stops(num_sequences, ON) == expected


@pytest.mark.parametrize("with_rival", [False, True])
def test_the_order_of_the_plans_does_not_matter(with_rival: bool) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        table = next(simulated(rng, 24, 0.1, heavy=True))
        table[3] = table[5]
        rival = table.min(axis=0) * 1.02 if with_rival else None
        order = rng.permutation(len(table))
        settings = RacingSettings(
            rounds=DOUBLING, bound=2.0, survivors=(9, 6, 3) if seed % 2 else None
        )
        straight = raced(table, settings, rival_S=rival)
        mixed = raced(table[order], settings, rival_S=rival)
        if seed % 2:  # of two equal plans, either may be the one too many
            assert sorted(map(len, straight)) == sorted(map(len, mixed))
        else:
            assert [len(straight[i]) for i in order] == [len(x) for x in mixed]


def test_a_rival_that_is_better_ends_the_race_of_all() -> None:
    table = next(simulated(np.random.default_rng(1), 64, 0.02, heavy=False))
    rows = raced(table, ON, rival_S=0.5 * table.min(axis=0))
    assert {len(x) for x in rows} == {8}


def test_counts_of_survivors_are_those_of_evopress() -> None:
    table = np.random.default_rng(3).standard_normal((16, 32))
    settings = RacingSettings(rounds=(0.25, 0.5, 1.0), bound=None, survivors=(6, 2))
    rows = raced(table, settings)
    assert sorted(map(len, rows)) == [8] * 10 + [16] * 4 + [32] * 2
    longest = [i for i, x in enumerate(rows) if len(x) >= 16]
    assert set(longest) == set(np.argsort(table[:, :8].mean(axis=1))[:6].tolist())


def test_what_is_on_file_is_not_asked_for_again() -> None:
    """A resumed race asks for the rest alone and comes to the same end."""
    values = next(simulated(np.random.default_rng(4), 32, 0.1, heavy=False))
    whole = Table(values)
    rows = race(whole, [np.array([])] * 12, 32, ON)
    rest = Table(values)
    on_file = [x if i % 3 else np.array([]) for i, x in enumerate(rows)]
    again = race(rest, on_file, 32, ON)
    assert [x.tolist() for x in again] == [x.tolist() for x in rows]
    assert rest.pairs == whole.pairs - sum(map(len, on_file))


def test_a_plan_that_is_not_finite_drops_out_and_spoils_nothing() -> None:
    table = next(simulated(np.random.default_rng(6), 64, 0.05, heavy=False))
    sound = raced(np.delete(table, 2, axis=0), ON)
    table[2, 5:] = NOT_FINITE
    rows = raced(table, ON)
    assert len(rows[2]) == 8
    assert [len(x) for x in rows[:2] + rows[3:]] == [len(x) for x in sound]
    scores = summaries(rows, 64, None)
    assert (scores[2]["fitness"], scores[2]["stderr"]) == (NOT_FINITE, 0.0)
    assert all(len(x) == 64 for x in raced(np.full((3, 64), NOT_FINITE), ON))


def test_a_plan_that_dropped_out_is_never_better_than_the_best_one() -> None:
    rng = np.random.default_rng(5)
    tables = [next(simulated(rng, 64, 0.1, heavy=True)) for _ in range(30)]
    hasty = RacingSettings(rounds=DOUBLING, bound=1.0)
    gaps = []
    for table in tables:
        rows = raced(table, hasty)
        scores = summaries(rows, 64, None)
        complete = [x["fitness"] for x in scores if x["sequences"] == 64]
        dropped = [i for i, x in enumerate(scores) if x["sequences"] < 64]
        assert all(scores[i]["fitness"] >= min(complete) for i in dropped)
        gaps += [scores[i]["fitness"] / table[i].mean() - 1 for i in dropped]
    assert len(gaps) > 100
    assert abs(float(np.median(gaps))) < 0.05


@pytest.mark.parametrize(
    "values",
    [
        {"rounds": ()},
        {"rounds": (0.5,)},
        {"rounds": (0.5, 0.5, 1.0)},
        {"rounds": (0.0, 1.0)},
        {"bound": 0},
        {"survivors": (3, 2)},
        {"survivors": (2, 3, 1)},
        {"survivors": (2, 1, 0)},
    ],
)
def test_races_without_an_end_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"racing|at least 1|greater than 0"):
        RacingSettings(**{"rounds": DOUBLING, **values})


class Noisy:
    """The scene's fitness times what a sequence makes of it, for 16 sequences."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.pairs = inner, 0

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> Floats:
        self.pairs += len(plans) * len(sequences)
        rows = [self.row(plan) for plan in plans]
        return np.array(rows)[:, list(sequences)]

    def row(self, plan: Plan) -> Floats:
        rng = np.random.default_rng(int(plan.key, 16))
        shared = np.random.default_rng(0).standard_normal(16)
        values: Floats = self.inner.of(plan) * np.exp(0.3 * shared + 0.05 * rng.standard_normal(16))
        return values


def noisy(scene: Scene, folder: Path, **settings: Any) -> SearchContext:
    context = scene(folder=folder, **{"racing": ON, **settings})
    object.__setattr__(context, "score", Noisy(context.score))
    object.__setattr__(context, "sequences", range(16))
    return context


def run(context: SearchContext, folder: Path) -> SearchResult:
    return run_search(context, folder / "checkpoints.sqlite")


@pytest.mark.parametrize("evaluations", [1, 2, 9, 40])
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_a_raced_search_keeps_its_promises(
    scene: Scene, tmp_path: Path, evaluations: int, bound: float
) -> None:
    context = noisy(
        scene,
        tmp_path,
        evaluations=evaluations,
        racing=RacingSettings(rounds=DOUBLING, bound=bound),
    )
    result = run(context, tmp_path)
    candidates = context.ledger.candidates()
    assert result.equivalents == context.score.pairs / 16  # type: ignore[attr-defined]
    assert evaluations - 1 < result.equivalents <= evaluations
    assert result.evaluations == len(candidates) >= result.equivalents
    assert result.best == context.ledger.best(1)[0]
    assert all(x.is_complete for x in result.finalists)
    for candidate in candidates:
        assert len(candidate.values) == candidate.scores["sequences"]
        assert candidate.fitness >= result.best.fitness
    if evaluations == 40:
        assert result.evaluations > 44
        assert sum(not x.is_complete for x in candidates) > 10


def test_a_search_that_may_drop_nobody_is_the_one_without_racing(
    scene: Scene, tmp_path: Path
) -> None:
    found = []
    for name, racing in (("off", OFF), ("wide", RacingSettings(rounds=DOUBLING, bound=1e9))):
        context = noisy(scene, tmp_path / name, racing=racing)
        run(context, tmp_path / name)
        found.append([{**x.to_json(), "seconds": 0} for x in context.ledger.candidates()])
    assert found[0] == found[1]
    assert len(found[0]) == 40


def test_racing_scores_more_plans_and_finds_better_ones(scene: Scene, tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"off": [], "on": []}
    plans: dict[str, list[int]] = {"off": [], "on": []}
    for seed in range(5):
        for name, racing in (("off", OFF), ("on", ON)):
            folder = tmp_path / f"{name}{seed}"
            context = noisy(scene, folder, racing=racing, seed=seed, evaluations=60)
            result = run(context, folder)
            best[name].append(context.score.inner.of(result.best.plan))  # type: ignore[attr-defined]
            plans[name].append(result.evaluations)
    assert np.mean(plans["on"]) > 1.2 * np.mean(plans["off"])
    assert np.mean(best["on"]) <= 1.01 * np.mean(best["off"])


def test_the_best_of_a_generation_is_a_complete_one_if_there_is_one(
    scene: Scene, tmp_path: Path
) -> None:
    context = noisy(scene, tmp_path, racing=RacingSettings(rounds=DOUBLING, bound=1.0))
    result = run(context, tmp_path)
    for line in result.generations:
        members = [x for x in context.ledger.candidates() if x.generation == line["generation"]]
        (assessed,) = (x for x in members if x.accuracy is not None)
        assert line["best_fitness"] == assessed.fitness
        pool = [x for x in members if x.is_complete] or members
        assert assessed.fitness == min(x.fitness for x in pool)
