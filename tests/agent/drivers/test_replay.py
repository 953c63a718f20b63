"""A recorded search given again: by place, failures and costs included."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.drivers.driver import Completion, Driver, DriverError, MayRetry, Place, Request
from agent.drivers.replay import ReplayDriver
from agent.graph import run_search
from agent.ledger import Ledger, LlmLine
from agent.state import Score, SearchContext
from pruning.plan import Plan

Scene = Callable[..., SearchContext]

MOVES = [
    '{"moves":[{"block":"mlp","take_from":0,"give_to":1,"units":3}]}',
    "I would rather not.",
    '{"moves":[{"block":"mlp","take_from":2,"give_to":4,"units":2}]}',
    '{"from_second":[0,2]}',
    '{"parents":[0,1,2]}',
    '{"moves":[{"block":"mlp","take_from":5,"give_to":3,"units":1}]}',
]


def line(slot: int, reply: str | None, call: int = 0, **changes: object) -> LlmLine:
    outcome = "accepted" if reply is not None else "failed: 503: busy"
    made = LlmLine(
        generation=2,
        slot=slot,
        operator="mutate",
        attempt=0,
        call=call,
        prompt_hash="abc",
        messages=({"role": "user", "content": "Hi!"},),
        reply=reply,
        tokens=30,
        estimated=reply is None,
        cost=0.25,
        seconds=1.5,
        model="m",
        outcome=outcome,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def recorded(folder: Path, *lines: LlmLine) -> ReplayDriver:
    ledger = Ledger(folder)
    for x in lines:
        ledger.add_line(x)
    return ReplayDriver(folder / "llm.jsonl")


def request(slot: int, **changes: object) -> Request:
    place = replace(Place(2, slot, "mutate", 0), **changes)  # type: ignore[arg-type]
    return Request(place, ({"role": "user", "content": "Other words."},), {}, 16, 0.0, 9)


def test_replies_are_found_by_place(tmp_path: Path) -> None:
    driver = recorded(tmp_path, line(1, "one"), line(0, "nil"), line(0, "again", attempt=1))
    asked = [request(0), request(1), request(0, attempt=1)]
    assert [(x.request, x.text) for x in driver.complete(asked, lambda _: True)] == [
        (0, "nil"),
        (1, "one"),
        (2, "again"),
    ]


def test_a_resumed_run_is_given_what_is_left(tmp_path: Path) -> None:
    """The first try failed before the stop and is on file; one of another driver is not given."""
    tries = [line(0, None), line(0, None, call=1), line(0, "nil", call=2)]
    recorded(tmp_path / "recorded", *tries)
    recorded(tmp_path / "run", tries[0], line(1, "of another"))
    given = tmp_path / "run" / "llm.jsonl"
    driver = ReplayDriver(tmp_path / "recorded" / "llm.jsonl", given)
    assert [x.text for x in driver.complete([request(0)], lambda _: True)] == [None, "nil"]


def test_a_reply_costs_what_it_did(tmp_path: Path) -> None:
    driver = recorded(tmp_path, line(0, "nil"))
    (done,) = driver.complete([request(0)], lambda _: True)
    assert (done.tokens, done.cost, done.seconds, done.model) == (30, 0.25, 1.5, "m")
    assert (done.estimated, done.failure) == (False, "")


@pytest.mark.parametrize(
    "change", [{"generation": 1}, {"slot": 5}, {"operator": "crossover"}, {"attempt": 1}]
)
def test_what_is_missing_is_named_after_the_others_were_replied_to(
    tmp_path: Path, change: dict[str, object]
) -> None:
    driver = recorded(tmp_path, line(0, "nil"), line(1, "one"))
    other = replace(request(0), place=replace(request(0).place, **change))  # type: ignore[arg-type]
    stream = driver.complete([other, request(1)], lambda _: True)
    assert next(stream).text == "one"
    with pytest.raises(DriverError, match=r"driver\.recording: .*llm\.jsonl has no reply for gen"):
        next(stream)


def test_failed_tries_fail_again(tmp_path: Path) -> None:
    asked = []

    def may_retry(number: int) -> bool:
        asked.append(number)
        return True

    driver = recorded(tmp_path, line(1, None), line(0, "nil"), line(1, None, 1), line(1, "one", 2))
    tries = list(driver.complete([request(0), request(1)], may_retry))
    assert [(x.request, x.text) for x in tries] == [(0, "nil"), (1, None), (1, None), (1, "one")]
    assert asked == [1, 1]
    assert tries[1].failure == "503: busy"
    assert tries[1].estimated


def test_what_failed_for_good_does_so_again(tmp_path: Path) -> None:
    asked: list[int] = []
    driver = recorded(tmp_path, line(0, None), line(1, "one"))
    tries = list(driver.complete([request(0), request(1)], lambda i: bool(asked.append(i))))
    assert [(x.request, x.text) for x in tries] == [(0, None), (1, "one")]
    assert not asked  # no further try is on file, so that none is set aside


def test_a_limit_ends_the_tries(tmp_path: Path) -> None:
    skipped = line(0, None, 1, tokens=0, cost=0.0, outcome="skipped: search.tokens")
    driver = recorded(tmp_path, line(0, None), skipped)
    (done,) = driver.complete([request(0)], lambda _: False)
    assert done.text is None
    with pytest.raises(DriverError):
        list(driver.complete([request(0)], lambda _: True))


def test_a_recording_has_to_be_there_and_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"driver\.recording: .*: no such file"):
        ReplayDriver(tmp_path / "llm.jsonl")
    (tmp_path / "llm.jsonl").write_text('{"operator": 5}\n')
    with pytest.raises(ValueError, match=r"llm\.jsonl, line 1"):
        ReplayDriver(tmp_path / "llm.jsonl")


class Moody:
    """Fails now and then before it replies, the same way for the same seed."""

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        for number, asked in enumerate(requests):
            rng = np.random.default_rng(asked.seed)
            while rng.random() < 0.3:
                yield Completion(number, None, 100, 7, 0.1, "moody", 0.01, True, "503: busy")
                if not may_retry(number):
                    break
            else:
                text = MOVES[int(rng.integers(len(MOVES)))]
                yield Completion(number, text, 80, 20, 0.1, "moody", cost=0.002)

    def close(self) -> None:
        pass


@dataclass
class Recorder:
    """Scores as `inner` does and keeps every row by its plan."""

    inner: Score
    rows: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        table = self.inner(plans, sequences)
        self.rows.update({p.key: row for p, row in zip(plans, table, strict=True)})
        return table


def lines_without_seconds(path: Path) -> list[str]:
    return re.sub(r'"seconds": [0-9.e+-]+', '"seconds": 0', path.read_text()).splitlines()


@pytest.mark.parametrize(
    "limits", [{}, {"tokens": 8000}, {"calls": 30}, {"strategy": "reflection"}, {"shown": 5}]
)
def test_a_replayed_search_with_recorded_scores_is_the_same_to_the_byte(
    scene: Scene, tmp_path: Path, limits: dict[str, object]
) -> None:
    def run(name: str, driver: Driver, score: Score | None) -> SearchContext:
        context = scene(allocator="llm", replies=[], folder=tmp_path / name, **limits)
        context = replace(context, driver=driver, score=score or Recorder(context.score))
        run_search(context, tmp_path / name / "checkpoints.sqlite")
        return context

    first = run("first", Moody(), None)
    assert isinstance(first.score, Recorder)
    rows = first.score.rows
    assert any(x.reply is None and not x.is_skipped for x in first.ledger.lines())

    def known(plans: Sequence[Plan], _: Sequence[int]) -> NDArray[np.float64]:
        return np.array([rows[p.key] for p in plans])

    run("second", ReplayDriver(tmp_path / "first" / "llm.jsonl"), known)
    for name in ("candidates.jsonl", "llm.jsonl"):
        texts = [lines_without_seconds(tmp_path / x / name) for x in ("first", "second")]
        assert texts[0] == texts[1]
        assert len(texts[0]) > 5
