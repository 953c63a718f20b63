"""The server's life against a stand-in that takes vLLM's arguments: no vLLM needed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.drivers import vllm_server
from agent.drivers.driver import DriverError
from agent.drivers.vllm_server import VllmServer

STAND_IN = """\
#!{python} -IS
import http.server, json, os, pathlib, signal, subprocess, sys, time
stubborn = "trap '' TERM; for i in $(seq 60); do sleep 1; done"
child = subprocess.Popen(["/bin/sh", "-c", stubborn])
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(60)  # where a test fails, nothing stays for long
facts = dict(arguments=sys.argv[1:], environment=dict(os.environ), pids=[os.getpid(), child.pid])
path = pathlib.Path({facts!r})
path.with_suffix(".tmp").write_text(json.dumps(facts))
path.with_suffix(".tmp").rename(path)
option = dict(zip(sys.argv, sys.argv[1:]))
model = dict(id=option["--served-model-name"], max_model_len=int(option["--max-model-len"]))
print("stand-in for", model["id"], flush=True)
{extra}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(dict(data=[model])).encode() if self.path == "/v1/models" else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((option["--host"], int(option["--port"])), Handler).serve_forever()
"""

# As vLLM tells of its end: what it is worth, then lines that only point back to it.
ENGINE_FAILED = """\
(EngineCore pid=7) ERROR 11-24 17:00:00 [core.py:1] ValueError: bad model
(APIServer pid=6)     raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
SETTING_REFUSED = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, bad model [type=value_error, input_type=ArgsKwargs]
    For further information visit the documentation
"""

OWNER = """\
import os, signal, sys
from pathlib import Path
from agent.drivers.vllm_server import VllmServer
server = VllmServer({model!r}, Path({log!r}), python={python!r})
server.start(30)
{end}
"""


class Scene:
    """A folder with a model, a log and a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.log, self.facts_file = folder / "toy", folder / "log", folder / "facts"
        self.model.mkdir()

    def stand_in(self, extra: str = "", name: str = "python") -> str:
        path = self.folder / name
        text = STAND_IN.format(python=sys.executable, facts=str(self.facts_file), extra=extra)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def server(self, extra: str = "", **options: Any) -> VllmServer:
        return VllmServer(str(self.model), self.log, python=self.stand_in(extra), **options)

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.facts_file.read_text())
        return facts

    def is_gone(self) -> bool:
        """Wait up to five seconds for the stand-in and its child to end."""
        until = time.monotonic() + 5
        while alive := [pid for pid in self.facts["pids"] if _is_alive(pid)]:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return not alive


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _answers(server: VllmServer) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/models", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(vllm_server, "_GRACE_SECONDS", 1.0)


def test_starts_waits_and_stops(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.log.write_text("earlier\n")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    waits: list[float] = []
    with scene.server("time.sleep(0.3)", max_model_len=1024) as server:
        server.start(30, waits.append)
        monkeypatch.delenv("http_proxy")
        assert _answers(server)
        assert (server.model_id, server.max_model_len, server.adopted) == ("toy", 1024, False)
        assert waits[-1] >= 0.3
        assert waits == sorted(waits)
        assert scene.log.read_text().startswith("earlier\nstand-in for toy\n")
    assert scene.is_gone()
    assert not _answers(server)
    server.stop()


def test_arguments_of_a_given_interpreter(scene: Scene) -> None:
    with scene.server(eager=True, gpu_share=0.25) as server:
        server.start(30)
    arguments = scene.facts["arguments"]
    start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(scene.model)]
    assert arguments[:4] == start
    assert arguments[-3:] == ["--enforce-eager", "--gpu-memory-utilization", "0.25"]
    options = dict(zip(arguments[4:-3:2], arguments[5:-3:2], strict=True))
    assert json.loads(options.pop("--structured-outputs-config")) == {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
    }
    assert options == {
        "--host": "127.0.0.1",
        "--port": server.url.split(":")[2].removesuffix("/v1"),
        "--served-model-name": "toy",
        "--max-model-len": "4096",
        "--dtype": "bfloat16",
    }


def test_without_interpreter_takes_the_command_on_the_path(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.stand_in(name="vllm")
    monkeypatch.setenv("PATH", str(scene.folder), prepend=os.pathsep)
    with VllmServer(str(scene.model), scene.log) as server:
        server.start(30)
    assert scene.facts["arguments"][:3] == ["serve", str(scene.model), "--host"]


@pytest.mark.parametrize("python", [None, "/no/such/python"])
def test_nothing_to_start_names_the_way_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setenv("PATH", str(scene.folder))
    with pytest.raises(ValueError, match=r"^driver\.python: no .*; run make venv-vllm .*$"):
        VllmServer(str(scene.model), scene.log, python=python).start(30)


def test_secrets_stay_here(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "my_secret", "PLAIN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with scene.server() as server:
        server.start(30)
    environment = scene.facts["environment"]
    assert not {"OPENAI_API_KEY", "HF_TOKEN", "my_secret"} & set(environment)
    assert environment["PLAIN"] == "x"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_a_hub_id_keeps_the_token_of_the_hub(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    with VllmServer("owner/toy", scene.log, python=scene.stand_in()) as server:
        server.start(30)
    assert server.model_id == "owner/toy"
    assert scene.facts["environment"]["HF_TOKEN"] == "x"
    assert scene.facts["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "4"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (ENGINE_FAILED, "ValueError: bad model"),
        (SETTING_REFUSED, "Value error, bad model [type=value_error, input_type=ArgsKwargs]"),
        ("Loading\n\n", "Loading"),
    ],
)
def test_death_at_the_start_tells_its_cause(scene: Scene, words: str, cause: str) -> None:
    scene.log.write_text("KeyError: of an earlier server\n")
    with pytest.raises(DriverError) as caught:
        scene.server(f"sys.stderr.write({words!r}); sys.exit(3)").start(30)
    assert str(caught.value) == f"vLLM: ended at its start (status 3): {cause} (log: {scene.log})"
    assert scene.is_gone()


def test_start_limit(scene: Scene) -> None:
    server = scene.server("print('Loading', flush=True); time.sleep(60)")
    with pytest.raises(DriverError, match=r"^vLLM: not ready after 0\.7 s: Loading \(log: .*\)$"):
        server.start(0.7)
    assert scene.is_gone()


def test_an_interrupted_wait_leaves_nothing(scene: Scene) -> None:
    def interrupt(_: float) -> None:
        if scene.facts_file.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.server("time.sleep(60)").start(30, interrupt)
    assert scene.is_gone()


def test_a_stubborn_server_is_killed(scene: Scene) -> None:
    server = scene.server("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    server.start(30)
    server.stop()
    assert scene.is_gone()


def test_adopts_what_answers_at_the_port_and_leaves_it(scene: Scene, tmp_path: Path) -> None:
    with scene.server(max_model_len=512) as own:
        own.start(30)
        port = int(own.url.split(":")[2].removesuffix("/v1"))
        with VllmServer("owner/other", tmp_path / "unused", python="/none", port=port) as found:
            found.start(30)
            assert (found.model_id, found.max_model_len, found.adopted) == ("toy", 512, True)
            assert found.url == own.url
        assert _answers(own)
        assert not (tmp_path / "unused").exists()


def test_starts_at_a_given_free_port(scene: Scene) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with scene.server(port=port) as server:
        server.start(30)
        assert server.url == f"http://127.0.0.1:{port}/v1"
        assert not server.adopted


def test_a_port_taken_by_something_else_is_refused(scene: Scene) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(DriverError, match=rf"^driver\.port: {port}: .* no healthy server"):
            scene.server(port=port).start(30)
    assert not scene.facts_file.exists()


def test_a_healthy_server_without_a_model_is_refused(scene: Scene) -> None:
    with scene.server("model = None") as own:
        own.start(30)
        port = int(own.url.split(":")[2].removesuffix("/v1"))
        other = VllmServer("owner/other", scene.log, port=port)
        with pytest.raises(DriverError, match=rf"^driver\.port: {port}: "):
            other.start(30)
        assert (other.model_id, other.adopted) == ("owner/other", False)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("sys.exit(5)", 5),
    ],
)
def test_the_end_of_its_owner_takes_it_along(scene: Scene, end: str, status: int) -> None:
    names = {"model": str(scene.model), "log": str(scene.log), "python": scene.stand_in()}
    owner = OWNER.format(end=end, **names)
    done = subprocess.run([sys.executable, "-c", owner], check=False, timeout=60)
    assert done.returncode == status
    assert scene.is_gone()
