"""A crew: workers that take one task each, keep what they loaded, and may die alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result = TypeVar("Result")
Work = Callable[[int, Task], Result]


class LostError(Exception):
    """A worker died over its task."""


class Crew(Protocol[Task_contra, Result]):
    """Workers with numbers; each has at most one task at a time."""

    @property
    def numbers(self) -> Sequence[int]:
        """Those of the workers there are."""

    def submit(self, number: int, task: Task_contra) -> Future[Result]:
        """Hand a task to a worker that has none; what came of it is for `outcome` to say."""

    def outcome(self, future: Future[Result]) -> Result:
        """Return the result of a task that is done.

        Raises:
            LostError: its worker died; `replace` it.
            ValueError: the worker raised it.
        """

    def replace(self, number: int) -> bool:
        """Put a new worker in the place of a dead one; return whether there is room for it.

        A number without room is none any more.
        """

    @property
    def running(self) -> list[Future[Result]]:
        """The tasks that are not done."""

    def interrupt(self) -> None:
        """Send the workers that have a task one SIGINT, or what is one to their search."""

    def kill(self) -> None:
        """End all workers at once."""

    def close(self) -> None:
        """End the workers; what runs is waited for, or lost where nobody waits for it."""


def outcomes(
    tasks: Iterable[Task], crew: Crew[Task, Result], again: Callable[[Task], bool]
) -> Generator[tuple[Task, Result], None, None]:
    """Yield the tasks with their results as they are done.

    Args:
        tasks: what to do, in this order.
        crew: who does it.
        again: asked when a worker died over a task, which then is done next, or left out.

    Raises:
        ValueError: a worker raised it, or none is left.
    """
    waiting, idle = deque(tasks), deque(crew.numbers)
    running: dict[Future[Result], tuple[int, Task]] = {}
    while waiting or running:
        while waiting and idle:
            number, task = idle.popleft(), waiting.popleft()
            running[crew.submit(number, task)] = number, task
        if not running:
            raise ValueError("--workers: the last one died, and there is room for no other")
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            number, task = running.pop(future)
            try:
                result = crew.outcome(future)
            except LostError:
                if again(task):
                    waiting.appendleft(task)
                if crew.replace(number):
                    idle.append(number)
                continue
            idle.append(number)
            yield task, result
