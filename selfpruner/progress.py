"""Progress of long stages: bars with remaining time, or sparse plain lines for a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Advance = Callable[..., None]


class Progress:
    """Shows stages and collects their wall time.

    `with progress.stage("calibrate", total=128) as advance: advance(16)`. Stages may nest. On a
    terminal each is a bar; elsewhere a line at most every `interval` seconds, and one at the end.
    `seconds` holds the wall time of each stage that ended, without that of stages within it,
    summed when a name comes again.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to `stream` (standard error by default); the clock counts seconds."""
        self.seconds: dict[str, float] = {}
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._clock = clock
        is_terminal = self._stream.isatty()
        self._bars: RichProgress | None = _bars(self._stream, clock) if is_terminal else None
        self._open = 0
        self._within = [0.0]  # seconds of the stages within each one that is open

    def __enter__(self) -> Self:
        """Return self; leaving the block takes the bars off the screen."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Time and show one stage; the value is `advance(n=1)`, counted towards `total`.

        Args:
            name: what is going on, in a word or two.
            total: number of steps, or None when unknown.
            done: steps that were done before; the time left is reckoned without them.
        """
        started = self._clock()
        self._within.append(0.0)
        display = self._bar if self._bars is not None else self._lines
        try:
            with display(name, total, done) as advance:
                yield advance
        finally:
            spent = self._clock() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._within.pop()
            self._within[-1] += spent

    def note(self, text: str) -> None:
        """Print one line without disturbing the bars."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def _bar(self, name: str, total: int | None, done: int) -> Iterator[Advance]:
        """Show the stage as a bar that stays when it is done."""
        bars = self._bars
        assert bars is not None
        if self._open == 0:
            bars.start()
        self._open += 1
        task = bars.add_task(name, total=total)
        bars.advance(task, done)  # the first advance is where rich begins to measure
        try:
            yield lambda n=1: bars.advance(task, n)
            bars.update(task, total=bars.tasks[task].completed or 1, completed=None)
        finally:
            bars.stop_task(task)
            self._open -= 1
            if self._open == 0:
                bars.stop()

    @contextmanager
    def _lines(self, name: str, total: int | None, done: int) -> Iterator[Advance]:
        """Show the stage as plain lines."""
        started = last = self._clock()
        before = done

        def advance(n: int = 1) -> None:
            nonlocal done, last
            done += n
            now = self._clock()
            if now - last >= self._interval:
                last = now
                self.note(_line(name, done, total, now - started, before))

        yield advance
        count = f" {done}/{total}" if total else ""
        self.note(f"{name}{count} done in {_duration(self._clock() - started)}")


def _line(name: str, done: int, total: int | None, spent: float, before: int) -> str:
    """Return one line of a log: name, count, time spent and, where known, time left.

    `before` of the steps done took none of the time spent.
    """
    if total is None or done <= before:
        return f"{name} {done}, {_duration(spent)}"
    left = max(total - done, 0) * spent / (done - before)
    return f"{name} {done}/{total}, {_duration(spent)}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bars(stream: TextIO, clock: Callable[[], float]) -> RichProgress:
    """Return rich's bars with count, time spent and time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream),
        get_time=clock,
        speed_estimate_period=math.inf,  # a step may take longer than any shorter one
    )
