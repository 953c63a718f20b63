"""The process of one engine: started, asked in JSON lines, ended, and its last words.

It runs `engine_worker.py`, started by path: the interpreter may be that of another environment.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

SILENCE_SECONDS = 1800.0  # before one answer; the slowest is that a large model has loaded

_WORKER = Path(__file__).with_name("engine_worker.py")
_GRACE_SECONDS = 10.0
_CAUSE = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b")


class EngineError(Exception):
    """A worker ended or gave no sense; one line, with the end of what it said."""


class EngineProcess:
    """A process with one engine and one model."""

    def __init__(self, process: subprocess.Popen[str], said: IO[bytes]) -> None:
        self._process, self._said = process, said
        self._failure: str | None = None

    @classmethod
    @contextmanager
    def started(cls, python: str, threads: int) -> Iterator[Self]:
        """Start the process with `threads` threads; it is gone when the block is left.

        Raises:
            EngineError: there is no such interpreter.
        """
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    [python, str(_WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    encoding="utf-8",
                    env=_environment(python, threads),
                )
            except OSError as error:
                raise EngineError(f"{python}: {error.strerror}") from error
            try:
                yield cls(process, said)
            finally:
                _end(process)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request.

        Raises:
            EngineError: the process ended, hangs, or gave no JSON, now or before: what a process
                says that once hung would be the answer to another request.
        """
        if self._failure is None:
            try:
                return self._answer(request)
            except EngineError as error:
                self._failure = str(error)
        raise EngineError(self._failure)

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the empty answer then says that it ended
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], SILENCE_SECONDS)[0]:
            raise EngineError(f"the worker said nothing for {SILENCE_SECONDS / 60:g} minutes")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self._how_it_ended()}: {self._last_words()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise EngineError(f"the worker answered {line.strip()[:100]!r}") from None
        return answer

    def peak_bytes(self) -> int:
        """Return the peak resident memory of the process and those it started, summed.

        What one process maps from a file counts while it is resident. Where the system keeps no
        peak (not Linux) it is the memory of now.
        """
        import psutil

        process = psutil.Process(self._process.pid)
        return sum(_peak(x) for x in [process, *process.children(recursive=True)])

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "the worker stopped answering"
        if status == -9:
            return "the worker was killed (signal 9; out of memory?)"
        return f"the worker ended ({'signal' if status < 0 else 'status'} {abs(status)})"

    def _last_words(self) -> str:
        """Return the last line that names a cause, else simply the last."""
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - 65_536))
        text = self._said.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
        causes = [line for line in lines if _CAUSE.match(line)]
        return (causes or lines)[-1][:300]


def _environment(python: str, threads: int) -> dict[str, str]:
    """Return this process's environment, for `threads` threads that do not spin while they wait.

    glibc keeps freed memory, as heaps made for servers do: how often it would give it back and
    fetch it again differs from one model to the next, and takes as long as their operations.
    """
    environment = dict(os.environ)
    if Path(python).absolute() != Path(sys.executable).absolute():
        environment.pop("PYTHONPATH", None)  # packages of this interpreter, not of that one
    defaults = {
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**27),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    forced = {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return defaults | environment | forced


def _end(process: subprocess.Popen[str]) -> None:
    """End a worker: by the end of its input, else by force."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _peak(process: Any) -> int:
    """Return the peak resident memory of a psutil process in bytes, 0 where it is gone."""
    from psutil import NoSuchProcess

    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with suppress(NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
