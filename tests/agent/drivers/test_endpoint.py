"""The forms of a call and of its answer, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from agent.drivers.driver import Message, Place, Request
from agent.drivers.endpoint import MAX_BYTES, Adaptation, Reply, Way, body_of, bound, first_model
from agent.drivers.failure import CallError

SCHEMA = {"type": "object", "properties": {"parents": {"type": "array"}}}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": "Hi!"}


def request(*messages: Message, schema: dict[str, Any] = SCHEMA) -> Request:
    return Request(Place(2, 3, "select", 1), messages or (SYSTEM, USER), schema, 16, 0.5, 7)


def test_the_strictest_way_names_the_schema() -> None:
    fields = Way("json_schema").arguments(request(), "m")
    assert fields["response_format"]["json_schema"] == {
        "name": "select",
        "schema": SCHEMA,
        "strict": True,
    }
    assert fields["messages"] == [SYSTEM, USER]


@pytest.mark.parametrize("route", ["json_object", "text"])
def test_looser_ways_tell_the_schema_in_words(route: Any) -> None:
    """An endpoint refuses json_object where the messages do not speak of JSON."""
    fields = Way(route).arguments(request(), "m")
    wanted = {"type": "json_object"} if route == "json_object" else None
    assert fields.get("response_format") == wanted
    system, user = fields["messages"]
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\n\n")
    assert system["content"].endswith(json.dumps(SCHEMA, separators=(",", ":")))
    assert "JSON" in system["content"]
    assert user == USER
    assert (SYSTEM["content"], USER["content"]) == ("Be brief.", "Hi!")


def test_the_words_get_a_message_of_their_own_where_no_system_speaks() -> None:
    first, *rest = Way("text").arguments(request(USER), "m")["messages"]
    assert first["role"] == "system"
    assert rest == [USER]


@pytest.mark.parametrize("route", ["json_schema", "json_object", "text"])
def test_free_text_needs_no_form(route: Any) -> None:
    fields = Way(route).arguments(request(schema={}), "m")
    assert "response_format" not in fields
    assert fields["messages"] == [SYSTEM, USER]


def test_fields_may_be_renamed_and_dropped() -> None:
    way = Way("text", "max_completion_tokens", frozenset({"temperature", "seed"}))
    fields = way.arguments(request(schema={}), "m")
    assert fields == {"model": "m", "messages": [SYSTEM, USER], "max_completion_tokens": 16}


def test_the_routes_are_gone_through_once() -> None:
    adaptation = Adaptation.begin("auto")
    ways = [adaptation.way]
    while adaptation.change(adaptation.way, "400: no"):
        ways.append(adaptation.way)
    assert [x.route for x in ways] == ["json_schema", "json_object", "text"]
    assert adaptation.way == ways[-1]


def test_a_late_refusal_of_a_former_way_changes_nothing() -> None:
    adaptation = Adaptation.begin("auto")
    former = adaptation.way
    assert adaptation.change(former, "400: no")
    present = adaptation.way
    assert adaptation.change(former, "400: no")
    assert adaptation.way == present


def test_a_late_success_of_a_former_way_fixes_nothing() -> None:
    adaptation = Adaptation.begin("auto")
    former = adaptation.way
    adaptation.change(former, "400: no")
    adaptation.works(former)
    assert adaptation.change(adaptation.way, "400: no")
    assert adaptation.way.route == "text"


def test_what_worked_keeps_its_route() -> None:
    adaptation = Adaptation.begin("auto")
    adaptation.works(adaptation.way)
    assert not adaptation.change(adaptation.way, "400: response_format is not known")
    assert adaptation.way.route == "json_schema"


def test_every_field_is_given_up_once() -> None:
    adaptation = Adaptation.begin("text")
    words = "400: unknown: max_tokens (use max_completion_tokens), temperature, seed"
    changes = 0
    while adaptation.change(adaptation.way, words):
        changes += 1
    assert changes == 3
    assert adaptation.way == Way(
        "text", "max_completion_tokens", frozenset({"temperature", "seed"})
    )


def body(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "x"}}], **fields}).encode()


def test_a_completion_is_read() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 0}
    assert Reply.from_body(body(usage=usage)) == Reply("x", 3, 0)
    assert Reply.from_body(body()) == Reply("x", None, None)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"5",
        b'"text"',
        b"[]",
        b"{}",
        b'{"choices":null}',
        b'{"choices":{}}',
        b'{"choices":[]}',
        b'{"choices":[null]}',
        b'{"choices":[{"message":null}]}',
        b'{"choices":[{"message":"x"}]}',
        b'{"choices":[{"text":"x"}]}',
        b'{"error":{"message":"x"}}',
        b'data: {"choices":[]}\n\n',
        b"[" * 100_000,
        b'{"choices":[{"message":{"content":' + b"9" * 5000 + b"}}]}",
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_completion_is_refused(raw: bytes) -> None:
    with pytest.raises(CallError, match="not a chat completion") as raised:
        Reply.from_body(raw)
    assert (raised.value.may_pass, raised.value.may_cost) == (True, True)


@pytest.mark.parametrize(
    "usage",
    [5, "5", [5], {"prompt_tokens": "5"}, {"prompt_tokens": 5.0}, {"prompt_tokens": float("nan")}],
)
def test_odd_usages_are_not_believed(usage: Any) -> None:
    assert Reply.from_body(body(usage=usage)) == Reply("x", None, None)


def test_contents_of_any_depth_are_read_or_refused() -> None:
    """What the reader of JSON still takes, its writer may not."""
    for depth in range(100, 1100):
        content = "[" * depth + "]" * depth
        raw = f'{{"choices":[{{"message":{{"content":[{content}]}}}}]}}'.encode()
        try:
            text = Reply.from_body(raw).text
        except CallError:
            assert depth > 500
        else:
            assert text == f"[{content}]"


@dataclass
class Pieces(httpx2.AsyncByteStream):
    pieces: Sequence[bytes]
    read: int = 0

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.read += 1
            yield piece

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.iter_bytes()


def test_a_body_is_read_to_its_limit_only() -> None:
    piece = b"x" * 2**20
    whole = Pieces([piece] * 4)
    assert len(asyncio.run(body_of(whole))) == MAX_BYTES
    endless = Pieces([piece] * 100)
    with pytest.raises(CallError, match="longer than 4194304 bytes"):
        asyncio.run(body_of(endless))
    assert endless.read == 5


def test_the_client_itself_reads_no_more_than_the_limit() -> None:
    async def read(response: httpx2.Response) -> bytes:
        await bound(response)
        return await response.aread()

    piece = b"x" * 2**20
    assert len(asyncio.run(read(httpx2.Response(400, stream=Pieces([piece] * 4))))) == MAX_BYTES
    endless = Pieces([piece] * 100)
    with pytest.raises(CallError, match="longer than 4194304 bytes"):
        asyncio.run(read(httpx2.Response(400, stream=endless)))
    assert endless.read == 5


def test_the_first_model_is_named() -> None:
    assert first_model(b'{"data":[{"id":"a/b-1.5"},{"id":"c"}]}') == "a/b-1.5"
    for raw in (b"", b"[]", b'{"data":[]}', b'{"data":[{"id":"a\\u0000"}]}', b'{"data":{}}'):
        with pytest.raises(CallError, match="none") as raised:
            first_model(raw)
        assert not raised.value.may_pass
