"""A vLLM server on this machine: a subprocess on a loopback port, gone when this process is.

POSIX only: the server and what it starts are one process group under a guard, a small Python
process that holds the read end of a pipe. Whatever ends this process, a SIGKILL included, closes
the other end, and the guard then ends the group. (A death signal of the kernel would go to the
server alone, which ignores SIGTERM while it starts, and would come when a mere thread ends.)
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from agent.drivers.driver import DriverError

OnWait = Callable[[float], None]
_Process = subprocess.Popen[bytes]

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.25
_REQUEST_SECONDS = 5.0
_GRACE_SECONDS = 10.0
_STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) ?)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] ?)?")
_CAUSE = re.compile(r"(Value error,|[\w.]*(Error|Exception):) (?!.*See root cause)")

# Its arguments: seconds of grace, then the server's command. Its handler, unlike SIG_IGN, is not
# inherited by the server; it stays to the end because it has to collect the server.
_GUARD = """
import os, select, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
while server.poll() is None:
    if select.select([0], [], [], 0.2)[0]:
        os.killpg(0, signal.SIGTERM)
        try:
            server.wait(float(sys.argv[1]))
        except subprocess.TimeoutExpired:
            pass
        os.killpg(0, signal.SIGKILL)
sys.exit(server.returncode if server.returncode >= 0 else 128 - server.returncode)
"""


class VllmServer:
    """One OpenAI-compatible server for one model, ours or found at the given port.

    Leaving a `with` block stops it; so does the end of this process, however it comes.

    Attributes:
        model_id: the name that requests give, known after `start`.
        max_model_len: longest prompt and reply in tokens; a found server's own, if it tells.
        adopted: a server was found: it is neither started nor stopped.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        *,
        python: str | None = None,
        port: int | None = None,
        max_model_len: int = 4096,
        eager: bool = False,
        gpu_share: float | None = None,
    ) -> None:
        """Say what to serve; nothing happens before `start`.

        `model` is a folder or a hub id. `log` gets the server's output, after what it holds.
        `python` is the interpreter of an environment that has vLLM; None takes the command
        `vllm`. `port` is where to look for a server and else to start one; None takes a free one.
        `eager` compiles nothing: ready in a third of the time, and then a fifth slower.
        `gpu_share` is how much of a GPU's memory the server takes; None leaves it to vLLM.
        """
        self.model_id = Path(model).name if Path(model).is_dir() else model
        self.max_model_len = max_model_len
        self.adopted = False
        self._model, self._log, self._python, self._eager = model, log, python, eager
        self._gpu_share = gpu_share
        self._given_port, self._port = port or 0, 0
        self._process: _Process | None = None

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients; known after `start`."""
        return f"http://{_HOST}:{self._port}/v1"

    def start(self, limit: float, on_wait: OnWait = lambda _: None) -> None:
        """Return when the server answers; call `on_wait` with the seconds waited now and then.

        Raises:
            ValueError: there is no vLLM to start; one line.
            DriverError: the port is taken, the server ended, or `limit` seconds went by; one line.
        """
        assert self._process is None, "started already"
        self._port = self._given_port
        if self._port and self._adopt():
            return
        self._port = _free_port(self._port)
        command = self._command()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            before = log.tell()
            self._process = _spawn(command, self._environment(), log)
        atexit.register(self.stop)
        try:
            if wrong := self._wait(self._process, limit, on_wait):
                line = _last_line(self._log, before)
                raise DriverError(f"vLLM: {wrong}: {line} (log: {self._log})")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End a server of our own and all it started; return when it is gone. Safe to repeat."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)  # what did not end, or outlived its leader
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _adopt(self) -> bool:
        """Return whether a healthy server with a model answers at the port; take its word."""
        if not is_healthy(self._port):
            return False
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # it may be anything
            model = json.loads(_get(self._port, "/v1/models") or b"")["data"][0]
            length = int(model.get("max_model_len") or self.max_model_len)
            self.model_id, self.max_model_len, self.adopted = str(model["id"]), length, True
        return self.adopted

    def _command(self) -> list[str]:
        program = shutil.which(self._python or "vllm")
        if program is None:
            missing = f"no interpreter {self._python!r}" if self._python else "no vllm on PATH"
            raise ValueError(
                f"driver.python: {missing}; run make venv-vllm and set .venv-vllm/bin/python, "
                "or name the interpreter of an environment that has vLLM"
            )
        module = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
        options = {
            "--host": _HOST,
            "--port": str(self._port),
            "--served-model-name": self.model_id,
            "--max-model-len": str(self.max_model_len),
            "--dtype": "bfloat16",
            "--structured-outputs-config": json.dumps(_STRUCTURED_OUTPUTS),
        }
        flags = [word for option in options.items() for word in option]
        flags += ["--enforce-eager"] * self._eager
        if self._gpu_share is not None:
            flags += ["--gpu-memory-utilization", str(self._gpu_share)]
        return [program, *(module if self._python else ["serve"]), self._model, *flags]

    def _environment(self) -> dict[str, str]:
        """This process's environment without secrets; a hub id keeps the hub's token."""
        kept = set() if Path(self._model).is_dir() else {"HF_TOKEN"}
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        return defaults | {
            name: value
            for name, value in os.environ.items()
            if name in kept or not _SECRET.search(name)
        }

    def _wait(self, process: _Process, limit: float, on_wait: OnWait) -> str:
        """Return what went wrong, empty when the server answers."""
        started = time.monotonic()
        while (status := process.poll()) is None:
            if is_healthy(self._port):
                return ""
            waited = time.monotonic() - started
            if waited >= limit:
                return f"not ready after {limit:g} s"
            on_wait(waited)
            time.sleep(_POLL_SECONDS)
        return f"ended at its start (status {status})"


def _spawn(command: list[str], environment: dict[str, str], log: BinaryIO) -> _Process:
    """Start the guard, and it the server, in a process group of their own."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(_GRACE_SECONDS), *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _free_port(port: int) -> int:
    """Return `port`, or any free one for 0.

    Raises:
        DriverError: it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            reason = f"{error.strerror}, and no healthy server with a model answers there"
            raise DriverError(f"driver.port: {port}: {reason}") from error
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    """Return whether a server on this machine answers at `port` that it is well."""
    return _get(port, "/health") is not None


def _get(port: int, path: str) -> bytes | None:
    """Return the body of a good answer, None without one. Proxies are for other machines."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{_HOST}:{port}{path}", timeout=_REQUEST_SECONDS) as reply:
            return bytes(reply.read())
    except (OSError, http.client.HTTPException):
        return None


def _last_line(log: Path, before: int) -> str:
    """Return the last line after byte `before` that names a cause, else simply the last."""
    with log.open("rb") as file:
        file.seek(max(before, log.stat().st_size - 65_536))
        text = file.read().decode(errors="replace")
    lines = [_LOG_PREFIX.sub("", line.strip()).strip() for line in text.splitlines()]
    lines = [line for line in lines if line] or ["no output"]
    causes = [line for line in lines if _CAUSE.match(line)]
    return (causes or lines)[-1][:300]
