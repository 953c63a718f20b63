"""Asking a run to stop: SIGINT and SIGTERM drain the search, and end anything else at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langgraph.runtime import RunControl

Handler = Callable[[int, FrameType | None], None]

_controls: list[RunControl] = []  # of the `draining` blocks under way


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came; like Ctrl-C it passes through `except Exception`."""


def stop_of(signal_name: str) -> KeyboardInterrupt:
    """Return what ends the program after this signal."""
    return KeyboardInterrupt() if signal_name == "SIGINT" else TerminatedError()


@contextmanager
def terminable() -> Iterator[None]:
    """Raise TerminatedError on SIGTERM within the block."""

    def end(_: int, __: FrameType | None) -> None:
        raise TerminatedError

    with _handled(end, (signal.SIGTERM,)):
        yield


@contextmanager
def draining(
    control: RunControl, tell: Callable[[str], None], leave: Callable[[int], None] = os._exit
) -> Iterator[None]:
    """Have the first signal ask `control` for a stop, and the second one end the process at once.

    At once means without waiting for the step under way, which may wait for an endpoint; a run
    folder stands that as it stands a SIGKILL.
    """

    def drain(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if control.drain_requested:
            how = "`selfpruner resume` goes on, and the same command where it was an experiment"
            tell(f"{name}: stopped at once; {how}")
            leave(128 + number)
        else:
            control.request_drain(name)
            tell(f"{name}: stopping after this step; once more stops at once")

    _controls.append(control)
    try:
        with _handled(drain, (signal.SIGINT, signal.SIGTERM)):
            yield
    finally:
        _controls.remove(control)


def raise_if_asked() -> None:
    """End the program where a stop was asked for already, without waiting for the step under way.

    Raises:
        KeyboardInterrupt: it was; TerminatedError for SIGTERM.
    """
    for control in _controls:
        if control.drain_requested:
            raise stop_of(str(control.drain_reason))


@contextmanager
def _handled(handler: Handler, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Put the handler in place for a while; only the main thread may, others do without."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
