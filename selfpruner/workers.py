"""Worker processes: cells side by side, each worker a process that may die alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing.process import BaseProcess

from selfpruner.cells import Cell, Figures, Outcomes

Work = Callable[[int, Cell], Figures]


def in_workers(
    cells: Sequence[Cell], work: Work, workers: int, tell: Callable[[str], None]
) -> Outcomes:
    """Yield the cells with their figures as they are done, `workers` of them at a time.

    Every worker is a pool of one spawned process, so that one that dies takes no other along: its
    cell is left out and told, and a new process takes its place. A stop by a signal, or an error
    in a cell, is passed on to all as one SIGINT, which a search answers by draining; a second one
    kills them.

    Args:
        cells: what to do, in this order.
        work: number of the worker (from 0) and cell to figures; a function of a module, or a
            `partial` of one, because it is sent to other processes.
        workers: processes, at least 1.
        tell: says one line to the user.

    Raises:
        ValueError: a cell raised it; its traceback is that of the worker.
    """
    waiting = deque(cells)
    pools = {number: _pool() for number in range(min(workers, len(waiting)))}
    idle = deque(pools)
    running: dict[Future[Figures], tuple[int, Cell]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                number, cell = idle.popleft(), waiting.popleft()
                running[_submit(pools[number], work, number, cell)] = number, cell
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, cell = running.pop(future)
                idle.append(number)
                try:
                    figures = future.result()
                except BrokenProcessPool:
                    pools[number] = _pool()
                    tell(f"lost: its worker died in {cell}; the same command goes on with it")
                    continue
                except ValueError as error:
                    raise ValueError(str(error)) from error
                yield cell, figures
    finally:
        _stop(running, tell)
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _submit(pool: ProcessPoolExecutor, work: Work, number: int, cell: Cell) -> Future[Figures]:
    """Hand a cell to a worker; one that is started here has SIGINT blocked from its birth."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_done, work, number, cell)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(work: Work, number: int, cell: Cell) -> Figures:
    """Return the figures of a cell, in the worker; only here a signal may interrupt it."""
    _settle()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return work(number, cell)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@cache
def _settle() -> None:
    """Leave the terminal's signals to the parent, and end with it, however it ends."""
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stop(running: Iterable[Future[Figures]], tell: Callable[[str], None]) -> None:
    """Ask the workers that are at work to stop and wait for them; a second Ctrl-C kills them."""
    left = list(running)
    if not left:
        return
    tell("stopping the workers after their step; once more stops them at once")
    try:
        for process in multiprocessing.active_children():
            _interrupt(process)
        wait(left)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()


def _interrupt(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
