"""Signals: the first drains, the second ends; what was in place before comes back."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from langgraph.runtime import RunControl

from selfpruner import searching
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.stopping import TerminatedError, draining, stop_of, terminable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_ends(number: signal.Signals) -> None:
    control, told, left = RunControl(), [], []
    before = signal.getsignal(number)
    with draining(control, told.append, left.append):
        assert not control.drain_requested
        os.kill(os.getpid(), number)
        assert control.drain_reason == number.name
        assert told == [f"{number.name}: stopping after this step; once more stops at once"]
        assert left == []
        os.kill(os.getpid(), number)
        assert left == [128 + number]
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_of_a_search_stops_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That search drains by itself, so that nobody else says so."""
    ledger = SimpleNamespace(equivalents=lambda: 1, candidates=tuple)
    context = SimpleNamespace(driver=None, ledger=ledger)
    monkeypatch.setattr(searching, "_context", lambda *_: context)
    monkeypatch.setattr(
        searching, "run_search", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    config: Any = SimpleNamespace(search=SimpleNamespace(evaluations=1))
    log, nothing = io.StringIO(), cast(Any, None)
    with pytest.raises(TerminatedError):
        searching.search(nothing, config, RunFolder(tmp_path), Progress(log))
    assert "SIGTERM: stopping after this step" in log.getvalue()


def test_sigterm_ends_what_is_not_a_search() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_has_the_name_of_its_signal() -> None:
    assert type(stop_of("SIGINT")) is KeyboardInterrupt
    assert type(stop_of("SIGTERM")) is TerminatedError
