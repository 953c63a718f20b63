"""The workforce: this process alone, processes beside it, or workers on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from selfpruner.crew import Crew, Result, Task, Work
from selfpruner.environment import usable_cores


@dataclass(frozen=True)
class Workforce:
    """Who does the work of a command.

    Attributes:
        size: processes on this machine; 1 is this process alone.
        address: of a Ray cluster, which then says how many workers there are; `local` for one
            that the command starts and ends; empty for none.
        asked_threads: of torch in each, None where nobody said.
    """

    size: int = 1
    address: str = ""
    asked_threads: int | None = None

    @classmethod
    def parse(cls, workers: str, threads: int | None) -> Workforce:
        """Return what `--workers` and `--threads` ask for.

        Raises:
            ValueError: the first is neither a number nor a cluster.
        """
        if workers == "ray":
            return cls(address="local", asked_threads=threads)
        if workers.startswith("ray://") and len(workers) > len("ray://"):
            return cls(address=workers, asked_threads=threads)
        if workers.isdecimal() and int(workers):
            return cls(int(workers), asked_threads=threads)
        raise ValueError(
            f"--workers: got {workers!r}; allowed: a number from 1, ray or ray://host:port"
        )

    def check(self) -> None:
        """Refuse a cluster that cannot be had, before anything is computed.

        Raises:
            ValueError: one line.
        """
        if self.address:
            from selfpruner.cluster import check

            check(self.address, self.asked_threads)

    @property
    def is_alone(self) -> bool:
        """Whether this process does it all."""
        return self.size == 1 and not self.address

    @property
    def threads(self) -> int | None:
        """Threads of torch in each: those asked for, or the cores shared out.

        A cluster's workers have as many as this process, whose scores they are to reproduce. None
        leaves this process alone its own.
        """
        if self.asked_threads is not None or self.is_alone:
            return self.asked_threads
        if self.address:
            import torch

            return torch.get_num_threads()
        return max(1, usable_cores() // self.size)

    @contextmanager
    def residents(
        self, work: Work[Task, Result], on_gpus: bool, tell: Callable[[str], None]
    ) -> Iterator[Crew[Task, Result]]:
        """Yield workers that keep what they have loaded, each in a process of its own.

        Raises:
            ValueError: they cannot be had.
        """
        if not self.address:
            processes = _processes(work, self.size)
            try:
                yield processes
            finally:
                if processes.running:
                    processes.kill()
                processes.close()
            return
        from selfpruner.cluster import Actors, connected

        assert self.threads is not None
        with (
            connected(self.address),
            closing(Actors(work, self.threads, on_gpus, tell)) as actors,
        ):
            yield actors

    @contextmanager
    def for_cells(self, work: Work[Task, Result], on_gpus: bool) -> Iterator[Crew[Task, Result]]:
        """Yield workers for tasks that may take hours and stop cleanly on a SIGINT.

        Raises:
            ValueError: they cannot be had.
        """
        if not self.address:
            yield _processes(work, self.size)
            return
        from selfpruner.cluster import Tasks, connected

        assert self.threads is not None
        with connected(self.address):
            yield Tasks(work, self.threads, on_gpus)


def _processes(work: Work[Task, Result], size: int) -> Crew[Task, Result]:
    from selfpruner.workers import Processes

    return Processes(work, size)


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Have torch use so many threads in the block; None leaves it alone."""
    import torch

    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
