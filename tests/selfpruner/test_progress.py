"""Progress: sparse plain lines in a log, wall seconds collected, bars on a terminal."""

from __future__ import annotations

import io

import pytest

from agent.graph import Event
from selfpruner.progress import Progress
from selfpruner.searching import narrator


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_lines_with_the_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress(log, interval=5.0, clock=clock)
    with progress.stage("calibrate", 20) as advance:
        for _ in range(20):
            clock.now += 1.0
            advance(1)
    assert log.getvalue().splitlines() == [
        "calibrate 5/20, 5.0 s, 15 s left",
        "calibrate 10/20, 10 s, 10 s left",
        "calibrate 15/20, 15 s, 5.0 s left",
        "calibrate 20/20, 20 s, 0.0 s left",
        "calibrate 20/20 done in 20 s",
    ]


def test_stages_nest_and_their_seconds_add_up_to_the_whole() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    with progress.stage("search"):
        for _ in range(2):
            with progress.stage("score", 1) as advance:
                clock.now += 2.0
                advance()
        clock.now += 1.0
    assert progress.seconds == {"score": 4.0, "search": 1.0}


def test_a_failed_stage_is_timed_but_not_called_done() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress(log, clock=clock)

    def fail() -> None:
        with progress.stage("search", 3):
            clock.now += 4000.0
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert progress.seconds == {"search": 4000.0}
    assert "done" not in log.getvalue()


def test_long_times_are_readable() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress(log, clock=clock)
    for name, seconds in [("a", 185.0), ("b", 7620.0)]:
        with progress.stage(name):
            clock.now += seconds
    assert log.getvalue() == "a done in 3 min 05 s\nb done in 2 h 07 min\n"


def test_a_terminal_gets_bars_and_notes() -> None:
    screen = Terminal()
    with Progress(screen) as progress:
        with progress.stage("calibrate", 4) as advance, progress.stage("layer") as inner:
            advance(4)
            inner()
            progress.note("kept [1, 2]")
        with progress.stage("search", 2) as advance:
            advance(2)
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "2/2" in shown
    assert "kept [1, 2]" in shown


def test_the_time_left_is_reckoned_without_what_was_done_before() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(log, clock=clock).stage("search", 60, done=40) as advance:
        clock.now += 50.0
        advance(10)
    assert log.getvalue().splitlines()[0] == "search 50/60, 50 s, 50 s left"


@pytest.mark.parametrize("done", [0, 40])
def test_a_bar_tells_the_time_left_of_steps_that_take_minutes(done: int) -> None:
    clock, screen = Clock(), Terminal()

    def stop() -> None:
        with Progress(screen, clock=clock).stage("search", 60, done=done) as advance:
            for _ in range(2):
                clock.now += 100.0
                advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    left = {0: "0:21:40", 40: "0:05:00"}[done]  # 52 or 12 steps of 25 s
    assert left in screen.getvalue()


def test_a_generation_moves_the_bar_once() -> None:
    """All its plans are scored together; the first one told of did not take that long alone."""
    clock, log = Clock(), io.StringIO()
    progress = Progress(log, clock=clock)
    told: list[Event] = [{"kind": "candidate", "equivalents": n} for n in (9.0, 10.0, 11.5, 12.0)]
    told += [{"kind": "down", "reason": "no connection"}] * 2
    told.append({"kind": "generation", "generation": 1, "best_fitness": 0.5, "accuracy": None,
                 "speedup": None})  # fmt: skip
    with progress.stage("search", 20, done=8) as advance:
        tell = narrator(advance, progress, 8)
        clock.now += 100.0
        for event in told:
            tell(event)
    assert log.getvalue().splitlines() == [
        "no LLM from here on: no connection",
        "search 12/20, 1 min 40 s, 3 min 20 s left",
        "generation 1: fitness 0.5000",
        "search 12/20 done in 1 min 40 s",
    ]
