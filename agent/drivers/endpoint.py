"""How endpoints differ: the forms in which a call may be sent, and what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import httpx2

from agent.drivers.driver import Message, Request
from agent.drivers.failure import CallError
from agent.settings import Structured

MAX_BYTES = 4 * 2**20  # of a reply's body

_LONGEST_NAME = 200
_ROUTES: tuple[Structured, ...] = ("json_schema", "json_object", "text")


@dataclass(frozen=True)
class Way:
    """One form of a call.

    Attributes:
        route: how JSON is asked for.
        length_field: name of the longest reply's field.
        dropped: sampling fields that the endpoint does not know.
    """

    route: Structured
    length_field: str = "max_tokens"
    dropped: frozenset[str] = frozenset()

    def arguments(self, request: Request, model: str) -> dict[str, Any]:
        """Return the fields of a chat completion."""
        fields = {
            "model": model,
            "messages": self._messages(request),
            self.length_field: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        fields = {k: v for k, v in fields.items() if k not in self.dropped}
        if request.schema and self.route == "json_schema":
            named = {"name": request.place.operator, "schema": request.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        elif request.schema and self.route == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return fields

    def _messages(self, request: Request) -> list[Message]:
        """Return the messages, with the schema in words where no field carries it."""
        if not request.schema or self.route == "json_schema":
            return list(request.messages)
        schema = json.dumps(request.schema, separators=(",", ":"))
        told = f"The reply must be one JSON object that fits this JSON schema: {schema}"
        first, *rest = request.messages
        if first["role"] != "system":
            return [{"role": "system", "content": told}, first, *rest]
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *rest]


@dataclass
class Adaptation:
    """The form that an endpoint accepts, found by trying and kept once it worked."""

    way: Way
    fixed: bool = False
    exhausted: bool = False  # a request was refused in every form

    @classmethod
    def begin(cls, structured: Structured) -> Self:
        """Return the strictest form, or the one that the setting names."""
        return cls(Way("json_schema" if structured == "auto" else structured), structured != "auto")

    def change(self, refused: Way, reason: str) -> bool:
        """Choose another form after `refused` was; return whether there is one to try."""
        if refused != self.way:
            return True
        changed = self._changed(reason.lower())
        self.way = changed or self.way
        self.exhausted = changed is None
        return changed is not None

    def works(self, way: Way) -> None:
        """Keep the route that brought a reply: a former one where later ones are refused too."""
        if not self.fixed and (way == self.way or self.exhausted):
            self.way, self.fixed = way, True

    def _changed(self, reason: str) -> Way | None:
        way = self.way
        if "max_completion_tokens" in reason and way.length_field == "max_tokens":
            return replace(way, length_field="max_completion_tokens")
        for field in ("temperature", "seed"):
            if field in reason and field not in way.dropped:
                return replace(way, dropped=way.dropped | {field})
        if self.fixed or way.route == _ROUTES[-1]:
            return None
        return replace(way, route=_ROUTES[_ROUTES.index(way.route) + 1])


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered; the tokens are None where it does not tell them credibly."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Return the first choice of a chat completion.

        Raises:
            CallError: the body is none.
        """
        try:
            data = json.loads(body.decode("utf-8", "replace"))
            message = data["choices"][0]["message"]
            text = message.get("content") or ""
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise CallError("the answer is not a chat completion", may_cost=True) from None
        usage = data.get("usage") or {}
        return cls(
            text if isinstance(text, str) else json.dumps(text),
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
        )


def first_model(body: bytes) -> str:
    """Return the name of the first model in a list of models.

    Raises:
        CallError: there is none.
    """
    try:
        name = json.loads(body.decode("utf-8", "replace"))["data"][0]["id"]
    except (ValueError, RecursionError, LookupError, TypeError):
        name = None
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise CallError("it lists none", may_pass=False)
    return name


class Streamed(Protocol):
    """A response whose body is read piece by piece."""

    def iter_bytes(self) -> AsyncIterator[bytes]:
        """Yield the body."""
        ...


async def body_of(response: Streamed) -> bytes:
    """Return the body of a response.

    Raises:
        CallError: it is longer than `MAX_BYTES`.
    """
    body = bytearray()
    async for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_BYTES:
            raise _too_long()
    return bytes(body)


class _Bounded(httpx2.AsyncByteStream):
    """A body as it is sent, of `MAX_BYTES` at most."""

    def __init__(self, body: httpx2.AsyncByteStream) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._body:
            size += len(piece)
            if size > MAX_BYTES:
                raise _too_long()
            yield piece

    async def aclose(self) -> None:
        await self._body.aclose()


async def bound(response: httpx2.Response) -> None:
    """Bound the body of a response; the client itself reads that of a refusal to its end."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)


def _too_long() -> CallError:
    return CallError(f"the answer is longer than {MAX_BYTES} bytes", may_cost=True)


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if sound else None
