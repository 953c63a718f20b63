"""Workers: every cell once, one that dies loses its own, a signal stops all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfpruner import workers
from selfpruner.cells import finish_cells
from selfpruner.workers import Processes, in_workers

pytestmark = pytest.mark.usefixtures("importable")


def test_every_cell_is_done_once_by_the_workers_there_are() -> None:
    from analytic_cells import square  # type: ignore[import-not-found]

    cells = [{"n": n} for n in range(6)]
    done = list(in_workers(cells, Processes(square, 2), print))
    assert sorted(cell["n"] for cell, _ in done) == list(range(6))
    assert all(figures["square"] == cell["n"] ** 2 for cell, figures in done)
    processes = {figures["process"] for _, figures in done}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {figures["worker"] for _, figures in done} == {0, 1}


def test_a_worker_that_dies_loses_only_its_cell(tmp_path: Path) -> None:
    from analytic_cells import square, square_or_die

    cells, told = [{"n": n} for n in range(5)], []
    path = tmp_path / "rows.jsonl"
    rows = finish_cells(
        path, cells, lambda x: in_workers(x, Processes(square_or_die, 2), told.append)
    )
    assert [x["cell"]["n"] for x in rows] == [0, 2, 3, 4]
    assert len(told) == 1
    assert "lost: its worker died in {'n': 1}" in told[0]
    assert len(path.read_text().splitlines()) == 4
    again = finish_cells(path, cells, lambda x: in_workers(x, Processes(square, 2), told.append))
    assert [x["cell"]["n"] for x in again] == [0, 1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 5


def test_a_worker_that_dies_without_a_task_is_replaced() -> None:
    from analytic_cells import square

    crew = Processes(square, 1)
    first = crew.outcome(crew.submit(0, {"n": 2}))
    os.kill(first["process"], signal.SIGKILL)
    until = time.monotonic() + 60
    while not crew._pools[0]._broken and time.monotonic() < until:
        time.sleep(0.05)
    second = crew.outcome(crew.submit(0, {"n": 3}))
    crew.close()
    assert second["square"] == 9
    assert second["process"] != first["process"]


def test_a_worker_that_ends_while_it_is_interrupted_stops_nobody() -> None:
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    workers._interrupt(process)


def test_a_refusal_comes_through_as_one() -> None:
    from analytic_cells import square_or_refuse

    with pytest.raises(ValueError, match="--workers: got 'none'"):
        list(in_workers([{"n": n} for n in range(2)], Processes(square_or_refuse, 2), print))


def test_a_defect_in_a_worker_is_no_refusal() -> None:
    """What a library refuses is ours to mend: it ends in a traceback, not in one line."""
    from analytic_cells import square_or_refuse

    with pytest.raises(RuntimeError, match="ValueError: operands could not") as error:
        list(in_workers([{"n": 2}], Processes(square_or_refuse, 1), print))
    assert "square_or_refuse" in str(error.value.__cause__)  # the worker's traceback


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt: a job that a shell put in the background began with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_stops_all_workers_cleanly(tmp_path: Path) -> None:
    from analytic_cells import wait_for_a_signal

    def interrupt() -> None:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("begun-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    started, told = time.monotonic(), []
    with pytest.raises(KeyboardInterrupt):
        list(
            in_workers(
                [{"folder": str(tmp_path)}] * 4, Processes(wait_for_a_signal, 2), told.append
            )
        )
    thread.join()
    assert sorted(x.name for x in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert len(list(tmp_path.glob("begun-*"))) == 2
    assert time.monotonic() - started < 90
    assert told == ["stopping the workers after their step; once more stops them at once"]
