"""Worker processes: cells side by side, each worker a process that may die alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Generic

from selfpruner.crew import Crew, LostError, Result, Task, Work, outcomes
from selfpruner.endings import faults_told_apart


def in_workers(
    cells: Sequence[Task], crew: Crew[Task, Result], tell: Callable[[str], None]
) -> Generator[tuple[Task, Result], None, None]:
    """Yield the cells with their figures as they are done; the crew is closed at the end.

    A worker that dies takes no other along: its cell is left out and told, and a new one takes its
    place. A stop by a signal, or an error in a cell, is passed on to all as one SIGINT, which a
    search answers by draining; a second one kills them.

    Raises:
        ValueError: a cell raised it; its traceback is that of the worker.
        RuntimeError: a library did so in a cell, which is a defect of ours.
    """

    def leave_out(cell: Task) -> bool:
        tell(f"lost: its worker died in {cell}; the same command goes on with it")
        return False

    try:
        yield from outcomes(cells, crew, leave_out)
    finally:
        _stop(crew, tell)
        crew.close()


class Processes(Generic[Task, Result]):
    """A crew of spawned processes on this machine.

    Every worker is a pool of one process, so that one that dies takes no other along.
    """

    def __init__(self, work: Work[Task, Result], size: int) -> None:
        """Start nothing yet.

        Args:
            work: number of the worker and task to result; a function of a module, or a `partial`
                of one, because it is sent to other processes.
            size: processes, at least 1.
        """
        self._work = work
        self._pools = [_pool() for _ in range(size)]
        self._last: dict[int, Future[Result]] = {}

    @property
    def numbers(self) -> Sequence[int]:
        """Those of the workers there are."""
        return range(len(self._pools))

    def submit(self, number: int, task: Task) -> Future[Result]:
        """Hand a task over; a process that is started here has SIGINT blocked from its birth.

        One that died while it had no task has lost nothing: another takes its place.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._last[number] = self._begun(number, task)
        except BrokenProcessPool:
            self.replace(number)
            self._last[number] = self._begun(number, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._last[number]

    def _begun(self, number: int, task: Task) -> Future[Result]:
        return self._pools[number].submit(_done, self._work, number, task)

    def outcome(self, future: Future[Result]) -> Result:
        """Return the result; raise LostError or the worker's ValueError."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise LostError from None
        except ValueError as error:
            raise ValueError(str(error)) from error

    def replace(self, number: int) -> bool:
        """Put a new process in the place of a dead one."""
        self._pools[number] = _pool()
        return True

    @property
    def running(self) -> list[Future[Result]]:
        """The tasks that are not done."""
        return [x for x in self._last.values() if not x.done()]

    def interrupt(self) -> None:
        """Send every process one SIGINT; those without a task leave it."""
        for process in multiprocessing.active_children():
            _interrupt(process)

    def kill(self) -> None:
        """End all processes at once."""
        for process in multiprocessing.active_children():
            process.kill()

    def close(self) -> None:
        """Wait for what runs and end the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [x for x in listed.split(",") if x]
    return [str(index) for index in range(torch.cuda.device_count())]


def take_device(number: int) -> None:
    """Give this process, worker `number`, a GPU of its own where there are enough."""
    devices = visible_devices()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _done(work: Work[Task, Result], number: int, task: Task) -> Result:
    """Return the result of a task, in the worker; only here a signal may interrupt it."""
    _settle()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with faults_told_apart():
            return work(number, task)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@cache
def _settle() -> None:
    """Leave the terminal's signals to the parent, and end with it, however it ends.

    A command in the background has SIGINT ignored, and hands that on: here it is to be heard.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stop(crew: Crew[Task, Result], tell: Callable[[str], None]) -> None:
    """Ask the workers that are at work to stop and wait for them; a second Ctrl-C kills them."""
    left = crew.running
    if not left:
        return
    tell("stopping the workers after their step; once more stops them at once")
    try:
        crew.interrupt()
        wait(left)
    except KeyboardInterrupt:
        crew.kill()


def _interrupt(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, signal.SIGINT)
