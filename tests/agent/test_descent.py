"""Descent on an analytic fitness whose slopes are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import descent
from agent.drivers.driver import Completion, MayRetry, Request
from agent.graph import run_search
from agent.knapsack import knapsack
from agent.ledger import Ledger, SlopeLine
from agent.questions import Slot
from agent.state import SearchContext
from pruning.plan import Plan

Scene = Callable[..., SearchContext]
Table = Sequence[tuple[Sequence[float], Sequence[float]]]


def _optimum(context: SearchContext) -> float:
    """The least fitness of all plans: that of the knapsack on the true losses."""
    score = context.score
    sizes = context.grid.attention, context.grid.mlp
    losses = [
        [w * (1 - np.array(size) / size[-1]) ** 2 for w, size in zip(row, sizes, strict=True)]
        for row in score.weights  # type: ignore[attr-defined]
    ]
    plan = context.grid.plan(knapsack(context.space, losses))
    return float(score([plan], [0])[0, 0])


def _flat(context: SearchContext) -> list[list[list[float]]]:
    """Losses of blocks that are all alike."""
    sizes = context.grid.attention, context.grid.mlp
    return [[[(1 - x / size[-1]) ** 2 for x in size] for size in sizes]] * context.space.layers


def _counting(context: SearchContext) -> tuple[SearchContext, list[tuple[Plan, list[int]]]]:
    assert context.slopes is not None
    honest, calls = context.slopes, []

    def slopes(plan: Plan, sequences: Sequence[int]) -> Table:
        calls.append((plan, list(sequences)))
        return honest(plan, sequences)

    return replace(context, slopes=slopes), calls


class _Undamped:
    """Draws the damping that counts losses once."""

    def uniform(self) -> float:
        return 1 / 3


@dataclass
class _Contrary:
    """Chooses the worst parents, and has no plans."""

    context: SearchContext

    def complete(self, requests: Sequence[Request], _: MayRetry) -> Iterator[Completion]:
        strategy = self.context.strategy
        assert strategy is not None
        for number, request in enumerate(requests):
            reply = "none"
            if request.place.operator == "select":
                known = request.schema["properties"]["parents"]["items"]["enum"]
                words = strategy.words("select")
                reply = json.dumps({**dict.fromkeys(words, "so"), "parents": known[:-4:-1]})
            yield Completion(number, reply, 100, 20, 0.5, "fake")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(4))
def test_undamped_steps_lead_to_the_optimum_of_an_additive_fitness(
    scene: Scene, tmp_path: Path, seed: int
) -> None:
    """Slopes and losses make the fitness itself where blocks have nothing to do with each other."""
    context = scene(allocator="descent", seed=seed, folder=tmp_path, seed_plan=False)
    score, start = context.score, context.grid.plan(context.first_plan)
    assert descent.measure(context, -1)
    undamped: Any = _Undamped()
    levels = descent.step(context, Slot(0, 0, "generate"), undamped)
    assert levels is not None
    found, first = score([context.grid.plan(levels), start], [0])[:, 0]
    assert found == pytest.approx(_optimum(context), rel=1e-9)
    assert found < 0.9 * first


def test_slopes_are_those_of_the_best_plan_on_sequences_from_the_end(
    scene: Scene, tmp_path: Path
) -> None:
    context, calls = _counting(scene(allocator="descent", evaluations=60, slopes=3))
    run_search(context, tmp_path / "checkpoints.sqlite")
    lines = context.ledger.slopes()
    assert [x.generation for x in lines] == list(range(-1, len(lines) - 1))
    assert {x.charge for x in lines} == {Fraction(descent.PRICE * 3, 4)}
    assert [x for _, x in calls][:3] == [[3, 2, 1], [0, 3, 2], [1, 0, 3]]
    for line, (plan, _) in zip(lines, calls, strict=True):
        best = context.ledger.best(1, line.generation + 1, complete=True)
        assert plan == (best[0].plan if best else context.grid.plan(context.first_plan))
        assert line.genotype == tuple(tuple(x) for x in plan.to_json())


def test_the_first_generation_steps_from_a_plan_handed_in(scene: Scene, tmp_path: Path) -> None:
    """Searches of a front begin with a plan of their neighbour: slopes are taken there."""
    context, calls = _counting(scene(allocator="descent", folder=tmp_path))
    context = replace(context, starts=[context.grid.plan(knapsack(context.space, _flat(context)))])
    assert descent.measure(context, -1)
    assert [x for x, _ in calls] == list(context.starts)
    assert context.starts[0] != context.grid.plan(context.first_plan)


def test_steps_descend_from_the_plan_they_are_taken_from(scene: Scene, tmp_path: Path) -> None:
    """Also where the LLM chose other parents, and its plans cannot be read."""
    context = scene(allocator="hybrid", operators="descent", evaluations=60, folder=tmp_path)
    context = replace(context, driver=_Contrary(context))
    run_search(context, tmp_path / "checkpoints.sqlite")
    later = [x for x in context.ledger.candidates() if x.generation > 0]
    steps = [x for x in later if x.origin in ("classical", "fallback")]
    assert {x.origin for x in steps} == {"classical", "fallback"}
    for candidate in steps:
        (best,) = context.ledger.best(1, candidate.generation, complete=True)
        assert candidate.parents == (best.id,)
    chosen = [x for x in context.ledger.lines() if x.operator == "select"]
    assert {x.outcome for x in chosen} == {"accepted"}


def test_a_curve_counts_slopes_with_the_plans_that_they_are_for(
    scene: Scene, tmp_path: Path
) -> None:
    context = scene(allocator="descent", evaluations=60, slopes=4, folder=tmp_path, population=5)
    run_search(context, tmp_path / "checkpoints.sqlite")
    ledger, last = context.ledger, context.ledger.candidates()[-1].generation
    count = [sum(x.generation <= i for x in ledger.candidates()) for i in range(last + 1)]
    assert len(ledger.slopes()) == last + 1
    for generation in range(last + 1):
        assert ledger.price(generation) == count[generation] + descent.PRICE * (generation + 1)
    assert ledger.price(last) == ledger.equivalents()


def test_slopes_are_charged_and_leave_room_for_plans(scene: Scene, tmp_path: Path) -> None:
    for evaluations in (3, 7, 8, 12, 30):
        folder = tmp_path / str(evaluations)
        folder.mkdir()
        context = scene(
            allocator="descent", evaluations=evaluations, slopes=4, folder=folder, population=2
        )
        result = run_search(context, folder / "checkpoints.sqlite")
        count, slopes = len(context.ledger.candidates()), context.ledger.slopes()
        assert result.equivalents == count + descent.PRICE * len(slopes) <= evaluations
        assert result.slopes == descent.PRICE * len(slopes)
        assert bool(slopes) == (evaluations >= 8)
        assert count >= 3


def test_a_step_is_the_knapsack_of_slopes_and_damped_losses(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="descent", folder=tmp_path)
    slot = Slot(0, 0, "generate")
    assert descent.step(context, slot, np.random.default_rng(0)) is None
    assert descent.measure(context, -1)
    assert not descent.measure(context, -1)
    (line,), base = context.ledger.slopes(), context.first_plan
    found = descent.step(context, slot, np.random.default_rng(0))
    damping = 0.5 * 8 ** np.random.default_rng(0).uniform()
    prices = [
        [
            np.array(slopes) + damping * np.abs(np.array(errors) - errors[level])
            for slopes, errors, level in zip(*row, strict=True)
        ]
        for row in zip(line.table, context.sensitivity, base, strict=True)
    ]
    assert found == knapsack(context.space, prices)


def test_steps_differ_in_length(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="descent", folder=tmp_path, seed_plan=False)
    descent.measure(context, -1)
    start = context.space.shares(context.first_plan)
    lengths = []
    for seed in range(8):
        plan = descent.step(context, Slot(0, 0, "generate"), np.random.default_rng(seed))
        assert plan is not None
        assert context.budget.is_within(plan)
        lengths.append(float(np.abs(context.space.shares(plan) - start).sum()))
    assert max(lengths) > 2 * min(lengths)


def test_earlier_slopes_weigh_less(scene: Scene, tmp_path: Path) -> None:
    """Twice the same line is the line; an opposite one before it does not outweigh it."""
    context = scene(allocator="descent", folder=tmp_path)
    descent.measure(context, -1)
    (line,) = context.ledger.slopes()
    rng, slot = np.random.default_rng, Slot(2, 0, "mutate")
    alone = descent.step(context, slot, rng(0))
    context.ledger.add_slopes(replace(line, generation=0))
    assert descent.step(context, slot, rng(0)) == alone
    other = Ledger(tmp_path / "other")
    opposite = tuple(tuple(tuple(-x for x in curve) for curve in row) for row in line.table)
    other.add_slopes(replace(line, table=opposite))  # type: ignore[arg-type]
    other.add_slopes(replace(line, generation=0))
    mixed = descent.step(replace(context, ledger=other), slot, rng(0))
    assert mixed is not None
    gain = sum(line.table[i][b][x[b]] for i, x in enumerate(mixed) for b in (0, 1))
    assert gain <= 0


def test_lines_come_back_as_they_were(scene: Scene, tmp_path: Path) -> None:
    context = scene(allocator="descent", folder=tmp_path)
    descent.measure(context, -1)
    (line,) = Ledger(tmp_path).slopes()
    assert isinstance(line, SlopeLine)
    assert [line] == context.ledger.slopes()
    (tmp_path / "slopes.jsonl").write_text('{"generation": 1}\n{"torn')
    with pytest.raises(ValueError, match=r"slopes.jsonl, line 1: not slopes"):
        Ledger(tmp_path)


def test_without_slopes_it_is_guided(scene: Scene, tmp_path: Path) -> None:
    plans = []
    for name in ("descent", "guided"):
        folder = tmp_path / name
        folder.mkdir()
        context = replace(scene(allocator=name, folder=folder, evaluations=8), slopes=None)
        run_search(context, folder / "checkpoints.sqlite")
        plans.append([x.key for x in context.ledger.candidates()])
    assert plans[0] == plans[1]
