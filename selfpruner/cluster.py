"""Crews on a Ray cluster: actors that hold a model, and tasks that are cells of an experiment.

Ray keeps the library of this project out of its packages: every node has it installed. Files are
named by path, so that nodes see the same ones where they share a file system.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic
from urllib.parse import urlsplit

from selfpruner.crew import LostError, Result, Task, Work
from selfpruner.endings import faults_told_apart
from selfpruner.environment import usable_cores

LOCAL = "local"

_STORE_BYTES = 128 * 2**20  # scores and plans are small
_PORT = 10001  # of Ray's clients, where an address names none
_ANSWER = 5.0  # seconds for a connection
_PATIENCE = 120.0  # seconds for a worker to begin; a busy cluster may never give it room

Needs = dict[str, int]


def check(address: str, threads: int | None) -> None:
    """Refuse a cluster that cannot be had, without Ray's help: before anything is computed.

    Raises:
        ValueError: Ray is not installed, nothing listens at `address`, or this machine has fewer
            cores than a worker of a `local` one needs; one line.
    """
    _check_installed()
    if address == LOCAL:
        cores = usable_cores()
        if threads is not None and threads > cores:
            raise ValueError(f"--threads: got {threads}; allowed: up to {cores}, the cores here")
        return
    place = urlsplit(address)
    try:
        port = place.port or _PORT
        socket.create_connection((place.hostname or "", port), timeout=_ANSWER).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"--workers: nothing answers at {address} ({error})") from None


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--workers: ray is not installed; pip install -e '.[cluster]' brings it")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to a cluster for the block; `local` is one that ends with it.

    A process that is connected already stays so, to the same cluster.

    Raises:
        ValueError: Ray is not installed, or does not answer at `address`; one line.
    """
    _check_installed()
    import ray

    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            size = _STORE_BYTES
            with _sheltered():
                ray.init(LOCAL, include_dashboard=False, object_store_memory=size, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if address == LOCAL:
            raise ValueError(f"--workers: Ray could not start here ({reason})") from error
        raise ValueError(
            f"--workers: no Ray cluster answers at {address} ({reason}); where it asks for a "
            "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    finally:
        _put_back(handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sheltered() -> Iterator[None]:
    """Have the processes that begin in the block ignore SIGTERM.

    Sent to the whole group of a command, as `timeout` does, it would end the cluster below a search
    that drains. The cluster is killed by `ray.shutdown`, and with this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _put_back(handler: Any) -> None:
    """Take SIGTERM back from Ray, which ends the process on it without a word."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def places(nodes: Sequence[Mapping[str, Any]], threads: int, on_gpus: bool) -> int:
    """Return for how many workers the nodes of a cluster have room.

    Args:
        nodes: as `ray.nodes()` lists them.
        threads: cores that a worker takes where it takes no GPU.
        on_gpus: whether each takes a GPU; a model lives on one device.

    Raises:
        ValueError: for none.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if on_gpus:
        count = sum(int(x.get("GPU", 0)) for x in alive)
        if not count:
            raise ValueError("--workers: the cluster has no GPU; --set device=cpu does without")
        return count
    cores = [int(x.get("CPU", 0)) for x in alive]
    count = sum(x // threads for x in cores)
    if not count:
        most = max(cores, default=0)
        raise ValueError(f"--threads: got {threads}; allowed: up to {most}, the cores of a node")
    return count


class _Ray(Generic[Task, Result]):
    """What both crews have in common; workers are numbered places of the cluster."""

    def __init__(self, work: Work[Task, Result], threads: int, on_gpus: bool) -> None:
        import ray

        self._ray, self._work, self._home = ray, work, str(Path.cwd())
        self._needs: Needs = {"num_gpus": 1, "num_cpus": 0} if on_gpus else {"num_cpus": threads}
        self._numbers = [*range(places(ray.nodes(), threads, on_gpus))]
        self._last: dict[int, tuple[Any, Future[Result]]] = {}

    @property
    def numbers(self) -> Sequence[int]:
        """Those of the workers there are."""
        return tuple(self._numbers)

    @property
    def running(self) -> list[Future[Result]]:
        """The tasks that are not done."""
        return [future for _, future in self._last.values() if not future.done()]

    def outcome(self, future: Future[Result]) -> Result:
        """Return the result; raise LostError or the worker's ValueError."""
        from ray import exceptions

        try:
            return future.result()
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise
        except (
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
        ):
            raise LostError from None

    def _begun(self, number: int, reference: Any) -> Future[Result]:
        future: Future[Result] = reference.future()
        self._last[number] = reference, future
        return future


class Actors(_Ray[Task, Result]):
    """A crew of actors: each keeps its process, and what that has loaded, until it is closed."""

    def __init__(
        self,
        work: Work[Task, Result],
        threads: int,
        on_gpus: bool,
        tell: Callable[[str], None],
    ) -> None:
        """Start the actors that there is room for now.

        Raises:
            ValueError: there is room for none.
        """
        super().__init__(work, threads, on_gpus)
        self._tell = tell
        self._make = self._ray.remote(**self._needs)(_Actor).remote
        wanted = len(self._numbers)
        begun = self._started([self._make() for _ in self._numbers])
        if len(begun) < wanted:
            tell(f"the cluster is busy: {len(begun)} of {wanted} workers began")
        self._actors = dict(enumerate(begun))
        self._numbers = [*self._actors]

    def submit(self, number: int, task: Task) -> Future[Result]:
        """Hand a task to an actor."""
        does = self._actors[number].do
        return self._begun(number, does.remote(self._home, self._work, number, task))

    def replace(self, number: int) -> bool:
        """Start an actor in the place of a dead one, if a node has room for it in time."""
        try:
            [self._actors[number]] = self._started([self._make()])
        except ValueError as error:
            self._tell(f"a worker is gone for good: {error}")
            del self._actors[number]
            self._numbers.remove(number)
            return False
        return True

    def interrupt(self) -> None:
        """End the actors: what they compute has no state to save."""
        self.kill()

    def kill(self) -> None:
        """End the actors at once."""
        for actor in self._actors.values():
            self._ray.kill(actor)

    def close(self) -> None:
        """End the actors; nobody waits for what runs."""
        self.kill()

    def _started(self, actors: list[Any]) -> list[Any]:
        """Return those that begin in time; the others are given up."""
        asked = {actor.ready.remote(): actor for actor in actors}
        there, missing = self._ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
        self._check(there)
        for reference in missing:
            self._ray.kill(asked[reference])
        if not there:
            raise ValueError(
                f"--workers: none of {len(actors)} began within {_PATIENCE:.0f} s; is the cluster "
                "busy?"
            )
        return [asked[reference] for reference in there]

    def _check(self, there: list[Any]) -> None:
        """Refuse a cluster where a worker began and failed."""
        from ray import exceptions

        try:
            self._ray.get(there)
        except exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"--workers: a worker could not begin ({reason}); is this project installed on "
                "every node?"
            ) from error


class Tasks(_Ray[Task, Result]):
    """A crew of tasks, as many at a time as there is room; Ray reuses the processes."""

    def __init__(self, work: Work[Task, Result], threads: int, on_gpus: bool) -> None:
        super().__init__(work, threads, on_gpus)
        # Ray would end the process of a GPU's task after one; the next wants the same model.
        self._does = self._ray.remote(**self._needs, max_retries=0, max_calls=0)(_task)

    def submit(self, number: int, task: Task) -> Future[Result]:
        """Hand a task over."""
        return self._begun(number, self._does.remote(self._home, self._work, task))

    def replace(self, number: int) -> bool:
        """Leave it to Ray, which starts another process for the next task."""
        del number
        return True

    def interrupt(self) -> None:
        """Raise in every task what SIGINT would."""
        self._cancel(force=False)

    def kill(self) -> None:
        """End the processes that have a task at once."""
        self._cancel(force=True)

    def close(self) -> None:
        """End what runs; the connection ends the rest."""
        self.kill()

    def _cancel(self, *, force: bool) -> None:
        for reference, future in self._last.values():
            if not future.done():
                self._ray.cancel(reference, force=force)


class _Actor:
    """A process that does one task after the other."""

    def ready(self) -> None:
        """Answer once the process has begun."""

    def do(self, home: str, work: Work[Task, Result], number: int, task: Task) -> Result:
        """Return what comes of a task."""
        return _done(home, work, number, task)


def _task(home: str, work: Work[Task, Result], task: Task) -> Result:
    """Return what comes of a task; any process may get it, so that its number is its own."""
    # A command in the background has SIGINT ignored, and so have the processes that Ray begins.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return _done(home, work, os.getpid(), task)


def _done(home: str, work: Work[Task, Result], number: int, task: Task) -> Result:
    """Return what comes of a task, with relative paths meaning what they mean to the command."""
    if Path(home).is_dir():
        os.chdir(home)
    with faults_told_apart():
        return work(number, task)
