"""A chat endpoint that does what a script says, and remembers what it was asked."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Act:
    """What the server does with one call.

    Attributes:
        status: of the answer.
        body: of the answer, sent as it is.
        headers: beside the length and the type.
        delay: seconds before the answer begins.
        sent: bytes of the body after which the connection is closed, None for all of them; 0 resets
            it before the status line.
        pause: seconds after every eighth of the body.
        bare: the body alone, without a status line and headers.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    sent: int | None = None
    pause: float = 0.0
    bare: bool = False

    def but(self, **changes: Any) -> Act:
        """Return this with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Call:
    """One call as it came in: its number from 0 and its time beside what HTTP says."""

    number: int
    time: float
    path: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        """The body as JSON."""
        data: dict[str, Any] = json.loads(self.raw)
        return data


Script = Sequence[Act] | Callable[[Call], Act]

RESET = Act(sent=0)
GARBAGE = Act(bare=True, body=b"\x00\xff this is not HTTP\r\n\r\n" * 20)


def said(text: Any, **more: Any) -> Act:
    """Return the answer `text`; `more` are fields of the body, `usage=None` leaves it out."""
    data: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42},
        **more,
    }
    return Act(body=json.dumps({k: v for k, v in data.items() if v is not None}).encode())


def refused(status: int, message: str = "no", **headers: str) -> Act:
    """Return a refusal in the usual form; `retry_after="3"` becomes a header."""
    body = json.dumps({"error": {"message": message}}).encode()
    return Act(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def listing(*names: Any) -> Act:
    """Return the list of models."""
    return Act(body=json.dumps({"object": "list", "data": [{"id": x} for x in names]}).encode())


def fitting(schema: Mapping[str, Any], rng: random.Random) -> Any:
    """Return a random value that fits a schema of the kind that the search asks with."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "object":
        return {name: fitting(x, rng) for name, x in schema["properties"].items()}
    if schema["type"] == "array":
        size = rng.randint(schema["minItems"], schema["maxItems"])
        return [fitting(schema["items"], rng) for _ in range(size)]
    if schema["type"] == "integer":
        return rng.randint(schema["minimum"], schema["maximum"])
    return "a reason"[: schema["maxLength"]]


def obliging(call: Call) -> Act:
    """Answer with what the call's schema asks for, the same for the same call."""
    schema = call.body["response_format"]["json_schema"]["schema"]
    return said(json.dumps(fitting(schema, random.Random(call.raw))))


class ChatServer:
    """Serves `/v1` on a free loopback port within a `with` block.

    A list is a script whose last act is repeated. `models` answers for the list of models.
    """

    def __init__(self, script: Script, models: Act | None = None) -> None:
        self._script, self._models = script, models or listing("first", "second")
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._now = 0
        self.calls: list[Call] = []
        self.listed = 0
        self.most_at_once = 0
        self._server = _Server(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The body of every call, in the order of arrival."""
        return [x.body for x in self.calls]

    def act(self, call: Call) -> Act:
        """Return what to do with a call."""
        if callable(self._script):
            return self._script(call)
        return self._script[min(call.number, len(self._script) - 1)]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                chat.listed += 1
                chat._perform(self, chat._models)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with chat._lock:
                    headers = {k.lower(): v for k, v in self.headers.items()}
                    call = Call(len(chat.calls), time.monotonic(), self.path, headers, raw)
                    chat.calls.append(call)
                    chat._now += 1
                    chat.most_at_once = max(chat.most_at_once, chat._now)
                try:
                    act = chat.act(call)
                    chat._closing.wait(act.delay)
                finally:
                    with chat._lock:
                        chat._now -= 1
                chat._perform(self, act.but(delay=0.0))

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _perform(self, handler: BaseHTTPRequestHandler, act: Act) -> None:
        self._closing.wait(act.delay)
        handler.close_connection = act.bare or act.sent is not None
        if act.bare:
            handler.wfile.write(act.body)
            return
        if act.sent == 0:
            _reset(handler)
            return
        handler.send_response(act.status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(act.body))}
        for name, value in {**fields, **act.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        body = act.body[: act.sent]
        step = max(1, -(-len(body) // 8)) if act.pause else max(1, len(body))
        for start in range(0, len(body), step):
            handler.wfile.write(body[start : start + step])
            self._closing.wait(act.pause)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that went away."""


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection so that the other side reads a reset, not an end."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
