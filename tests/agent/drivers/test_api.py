"""The driver of an endpoint against a server that misbehaves: every rule of trying again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest
from tenacity import wait_none

from agent.drivers import failure
from agent.drivers.api import ApiDriver
from agent.drivers.driver import Completion, DriverError, MayRetry, Place, Request
from agent.drivers.endpoint import MAX_BYTES
from agent.drivers.vllm import VllmDriver
from agent.settings import Endpoint, Price
from tests.agent.drivers.chat_server import (
    GARBAGE,
    RESET,
    Act,
    Call,
    ChatServer,
    listing,
    refused,
    said,
)

GOOD = said("good")
TIMEOUT = 1.0
PLENTY = 30.0  # for tests in which no call is meant to be late
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an endpoint asks for is waited for; the random part is not."""
    monkeypatch.setattr(failure, "_backoff", wait_none())


def ask_for(slot: int = 0, **changes: Any) -> Request:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"})
    place = Place(0, slot, "generate", 0)
    fields = {"schema": SCHEMA, "max_tokens": 16, "temperature": 0.5, "seed": 7, **changes}
    return Request(place, messages, **fields)


@contextmanager
def driving(server: ChatServer, *, model: str | None = "m", **changes: Any) -> Iterator[ApiDriver]:
    settings = Endpoint(kind="api", base_url=server.url, **{"timeout": PLENTY, **changes})
    driver = ApiDriver(settings, base_url=server.url, model=model)
    try:
        yield driver
    finally:
        driver.close()


def complete(
    driver: ApiDriver, count: int = 1, may_retry: MayRetry = lambda _: True
) -> list[Completion]:
    return list(driver.complete([ask_for(i) for i in range(count)], may_retry))


def complete_in_vain(driver: ApiDriver, count: int = 1) -> tuple[list[Completion], str]:
    """Return the tries and what the driver says when it gives up; seeds are the numbers."""
    tries: list[Completion] = []
    stream = driver.complete([ask_for(i, seed=i) for i in range(count)], lambda _: True)
    with pytest.raises(DriverError) as raised:
        tries.extend(stream)
    return tries, str(raised.value)


def test_a_vllm_server_gets_no_key_of_endpoints_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-elsewhere")
    monkeypatch.setenv("OWN_KEY", "sk-own")

    class Server:  # adopted: somebody else may have started it
        model_id = "m"

        def __init__(self, url: str) -> None:
            self.url = url

        def start(self, *_: Any) -> None: ...

        stop = start

    with ChatServer([said("ok")]) as server:
        for changes in ({}, {"key_variable": "OWN_KEY"}):
            settings = Endpoint(kind="vllm", timeout=PLENTY, **changes)
            driver = VllmDriver(settings, Server(server.url), on_wait=lambda _: None)  # type: ignore[arg-type]
            complete(driver)
            driver.close()
    sent = [x.headers["authorization"] for x in server.calls]
    assert sent == ["Bearer none", "Bearer sk-own"]


def test_a_call_says_what_the_request_says() -> None:
    with ChatServer([GOOD]) as server, driving(server) as driver:
        (done,) = complete(driver)
    assert (done.request, done.text, done.failure, done.model) == (0, "good", "", "m")
    assert (done.prompt_tokens, done.completion_tokens, done.estimated) == (30, 12, False)
    assert 0 < done.seconds < PLENTY
    form = {"name": "generate", "schema": SCHEMA, "strict": True}
    assert server.calls[0].path == "/v1/chat/completions"
    assert server.bodies == [
        {
            "model": "m",
            "messages": list(ask_for().messages),
            "max_tokens": 16,
            "temperature": 0.5,
            "seed": 7,
            "response_format": {"type": "json_schema", "json_schema": form},
        }
    ]


def test_a_request_without_a_schema_asks_for_no_form() -> None:
    with ChatServer([GOOD]) as server, driving(server) as driver:
        list(driver.complete([ask_for(schema={})], lambda _: True))
    assert "response_format" not in server.bodies[0]


PASSING = {
    "reset": (RESET, "no connection", True),
    "garbage": (GARBAGE, "no connection", True),
    "half a body": (GOOD.but(sent=40), "the connection broke", True),
    "stall": (GOOD.but(delay=3 * TIMEOUT), "no reply within driver.timeout", True),
    "slow drip": (GOOD.but(pause=TIMEOUT / 4), "no reply within driver.timeout", True),
    "slow refusal": (refused(400).but(pause=TIMEOUT / 4), "no reply within driver.timeout", True),
    "huge body": (said("x" * MAX_BYTES), "the answer is longer than", True),
    "huge refusal": (refused(400, "x" * MAX_BYTES), "the answer is longer than", True),
    "no JSON": (Act(body=b"<html>"), "the answer is not a chat completion", True),
    "no choices": (Act(body=b'{"choices":[]}'), "the answer is not a chat completion", True),
    "deep": (Act(body=b"[" * 100_000), "the answer is not a chat completion", True),
    **{
        str(x): (refused(x), f"{x}: ", x in (408, 504))
        for x in (408, 409, 429, 500, 502, 503, 504, 529)
    },
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    act, words, may_cost = PASSING[name]
    price = Price(prompt=1e6, completion=2e6)
    script = [act, GOOD]
    timeout = TIMEOUT if "driver.timeout" in words else PLENTY
    with ChatServer(script) as server, driving(server, price=price, timeout=timeout) as driver:
        began = time.monotonic()
        failed, done = complete(driver)
        assert time.monotonic() - began < 2 * timeout
    assert len(server.calls) == 2
    assert (failed.text, done.text) == (None, "good")
    assert failed.failure.startswith(words)
    assert len(failed.failure) < 300
    assert "()" not in failed.failure
    # "Be brief." and "Hi!" are 12 bytes, at most as many tokens; the reply may have 16.
    charged = (12, 16, True, 44.0) if may_cost else (0, 0, False, 0.0)
    assert (
        failed.prompt_tokens,
        failed.completion_tokens,
        failed.estimated,
        failed.cost,
    ) == charged
    assert (done.tokens, done.estimated, done.cost) == (42, False, 54.0)


def test_nobody_there_costs_nothing() -> None:
    with ChatServer([GOOD]) as server:
        pass
    with driving(server, tries=3) as driver:
        tries, words = complete_in_vain(driver)
    assert [x.text for x in tries] == [None] * 3
    assert {(x.tokens, x.estimated) for x in tries} == {(0, False)}
    assert words.startswith(f"driver {server.url}: no connection (")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422, 501])
def test_what_will_not_pass_is_tried_once(status: int) -> None:
    script = [refused(status, "never")]
    with ChatServer(script) as server, driving(server, structured="text") as driver:
        tries, words = complete_in_vain(driver)
    assert len(server.calls) == len(tries) == 1
    assert words.startswith(f"driver {server.url}: {status}: ")
    assert "never" in words


@pytest.mark.parametrize("act", [refused(503), RESET, Act(body=b"{}")])
@pytest.mark.parametrize("tries", [1, 3])
def test_there_is_one_layer_of_tries(act: Act, tries: int) -> None:
    with ChatServer([act]) as server, driving(server, tries=tries) as driver:
        made, _ = complete_in_vain(driver)
        assert len(server.calls) == len(made) == tries
        complete_in_vain(driver)  # a driver that gave up may be asked again
    assert len(server.calls) == 2 * tries


def routes(server: ChatServer) -> list[str]:
    return [x.get("response_format", {"type": "text"})["type"] for x in server.bodies]


@pytest.mark.parametrize("status", [400, 404, 415, 422, 501])
def test_the_form_is_changed_and_remembered(status: int) -> None:
    def script(call: Call) -> Act:
        return refused(status) if "response_format" in call.body else GOOD

    with ChatServer(script) as server, driving(server) as driver:
        tries = complete(driver)
        complete(driver)
    assert [x.text for x in tries] == [None, None, "good"]
    assert {(x.tokens, x.cost) for x in tries[:2]} == {(0, 0.0)}
    assert routes(server) == ["json_schema", "json_object", "text", "text"]
    assert server.bodies[0]["messages"] == list(ask_for().messages)
    for body in server.bodies[1:]:
        system, user = body["messages"]
        assert system["content"].startswith("Be brief.\n\nThe reply must be one JSON object")
        assert '{"x":{"type":"integer"}}' in system["content"]
        assert user == ask_for().messages[1]


def test_the_form_is_not_changed_once_it_worked() -> None:
    script = [refused(400), GOOD, refused(400, "too long"), GOOD]
    with ChatServer(script) as server, driving(server) as driver:
        complete(driver)
        (failed,) = driver.complete([ask_for()], lambda _: True)
        complete(driver)
    assert failed.text is None
    assert "too long" in failed.failure
    assert routes(server) == ["json_schema", "json_object", "json_object", "json_object"]


@pytest.mark.parametrize("form", ["json_schema", "json_object", "text"])
def test_a_form_that_is_set_is_kept(form: str) -> None:
    with ChatServer([refused(400)]) as server, driving(server, structured=form) as driver:
        complete_in_vain(driver)
    assert routes(server) == [form]


def test_failures_that_pass_do_not_change_the_form() -> None:
    script = [refused(503), RESET, refused(429), GOOD]
    with ChatServer(script) as server, driving(server) as driver:
        complete(driver)
    assert routes(server) == ["json_schema"] * 4


@pytest.mark.parametrize("status", [401, 404, 501])
def test_an_endpoint_that_is_not_there_any_more_is_given_up_at_once(status: int) -> None:
    with ChatServer([GOOD, refused(status)]) as server, driving(server) as driver:
        complete(driver)
        tries, _ = complete_in_vain(driver)
    assert len(tries) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_endpoint_that_refuses_all_is_given_up_although_it_answered(status: int) -> None:
    script = [GOOD, *[refused(status)] * 2, GOOD, *[refused(status)] * 3]
    with ChatServer(script) as server, driving(server, tries=3) as driver:
        for good in (True, False, False, True, False, False):
            (done,) = driver.complete([ask_for()], lambda _: True)
            assert (done.text is not None) == good
        complete_in_vain(driver)


def test_an_endpoint_that_answered_in_an_earlier_process_may_refuse_one() -> None:
    with ChatServer([refused(413), GOOD]) as server:
        settings = Endpoint(kind="api", base_url=server.url, timeout=PLENTY, structured="text")
        driver = ApiDriver(settings, base_url=server.url, model="m", has_answered=True)
        with closing(driver):
            (failed,) = driver.complete([ask_for()], lambda _: True)
            complete(driver)
    assert failed.text is None


def test_the_form_that_worked_is_kept_though_another_request_was_refused_in_all() -> None:
    def script(call: Call) -> Act:
        is_long = "long" in call.body["messages"][-1]["content"]
        return refused(400, "too long") if is_long else GOOD.but(delay=0.5)

    long = replace(ask_for(1), messages=({"role": "user", "content": "long"},))
    with ChatServer(script) as server, driving(server, batch=2) as driver:
        done = list(driver.complete([ask_for(), long], lambda _: True))
        complete(driver)
    assert [x.request for x in done if x.text is not None] == [0]
    assert routes(server)[-1] == "json_schema"


def test_a_form_that_all_in_flight_found_refused_is_changed_once() -> None:
    def script(call: Call) -> Act:
        form = call.body.get("response_format", {}).get("type")
        return refused(400).but(delay=0.1) if form == "json_schema" else GOOD

    with ChatServer(script) as server, driving(server, batch=4) as driver:
        tries = complete(driver, 4)
    assert sorted(routes(server)) == ["json_object"] * 4 + ["json_schema"] * 4
    assert sum(x.text == "good" for x in tries) == 4


def test_fields_that_an_endpoint_does_not_know_are_left_out() -> None:
    """As the reasoning models of OpenAI answer: one complaint after the other."""

    def script(call: Call) -> Act:
        if "max_tokens" in call.body:
            words = "'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return refused(400, f"Unsupported parameter: {words}")
        for name in ("temperature", "seed"):
            if name in call.body:
                return refused(400, f"Unsupported value: '{name}' does not support 0.5.")
        return GOOD

    with ChatServer(script) as server, driving(server) as driver:
        assert [x.text for x in complete(driver)] == [None, None, None, "good"]
        complete(driver)
    assert server.bodies[3] == server.bodies[4]
    assert set(server.bodies[3]) == {
        "model",
        "messages",
        "max_completion_tokens",
        "response_format",
    }
    assert server.bodies[3]["max_completion_tokens"] == 16
    assert set(routes(server)) == {"json_schema"}


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry_after": "0.4"}, 0.4, 1.5),
        ({"retry_after_ms": "300"}, 0.3, 1.5),
        ({"retry_after_ms": "300", "retry_after": "9"}, 0.3, 1.5),
        ({"retry_after": "soon"}, 0.0, 1.0),
        ({"retry_after": "-5"}, 0.0, 1.0),
        ({"retry_after": "nan"}, 0.0, 1.0),
        ({"retry_after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(
    headers: dict[str, str], low: float, high: float, status: int
) -> None:
    with ChatServer([refused(status, **headers), GOOD]) as server, driving(server) as driver:
        complete(driver)
    first, second = server.calls
    assert low <= second.time - first.time < high


@pytest.mark.parametrize("status", [429, 503])
def test_a_date_in_retry_after_is_waited_for(status: int) -> None:
    date = int(time.time()) + 3
    refusal = refused(status, retry_after=formatdate(date, usegmt=True))
    with ChatServer([refusal, GOOD]) as server, driving(server) as driver:
        complete(driver)
        assert date <= time.time()
    assert len(server.calls) == 2


@pytest.mark.parametrize("value", ["3600", "1e300", "date"])
def test_a_retry_after_beyond_the_patience_ends_at_once(value: str) -> None:
    if value == "date":
        value = formatdate(time.time() + 3600, usegmt=True)
    with ChatServer([refused(429, retry_after=value)]) as server, driving(server) as driver:
        began = time.monotonic()
        complete_in_vain(driver)
    assert time.monotonic() - began < 5
    assert len(server.calls) == 1


def test_patience_ends() -> None:
    script = [refused(503, retry_after="0.2")]
    with ChatServer(script) as server, driving(server, tries=100, patience=0.7) as driver:
        began = time.monotonic()
        complete_in_vain(driver)
        assert time.monotonic() - began < 5
    assert 2 <= len(server.calls) <= 4


def test_patience_begins_with_the_first_try_of_a_request() -> None:
    """Not while it waits for its turn behind slow ones."""

    def script(call: Call) -> Act:
        return refused(503) if call.number == 2 else GOOD.but(delay=0.25)

    with ChatServer(script) as server, driving(server, batch=1, patience=0.3) as driver:
        assert [x.text for x in complete(driver, 3)] == ["good", "good", None, "good"]


def test_a_try_that_is_not_allowed_is_not_made() -> None:
    asked = []

    def never(number: int) -> bool:
        asked.append(number)
        return False

    with ChatServer([refused(503)]) as server, driving(server) as driver:
        tries = complete(driver, 3, never)
    assert len(server.calls) == 3
    assert sorted(x.request for x in tries) == sorted(asked) == [0, 1, 2]
    assert {x.text for x in tries} == {None}


@pytest.mark.parametrize("act", [refused(400), refused(503), RESET])
def test_leave_is_asked_for_after_the_failure_is_known(act: Act) -> None:
    """A driver that asks too early makes its caller count the failed try as free."""
    known, granted = Counter[int](), Counter[int]()

    def may_retry(number: int) -> bool:
        granted[number] += 1
        assert known[number] == granted[number]
        return True

    def script(call: Call) -> Act:
        bad = "response_format" in call.body if act.status == 400 else call.number < 5
        return act if bad else GOOD

    with ChatServer(script) as server, driving(server) as driver:
        for completion in driver.complete([ask_for(i) for i in range(4)], may_retry):
            time.sleep(0.02)  # a caller that takes its time
            known[completion.request] += completion.text is None
    assert known == granted
    assert known.total() == len(server.calls) - 4 >= 5


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 1e9, "completion_tokens": True},
        {"prompt_tokens": 2**40, "completion_tokens": 1},
    ],
)
def test_without_a_credible_usage_tokens_are_estimated(usage: Any) -> None:
    text = "x" * 20
    price = Price(prompt=1e6, completion=1e6)
    with ChatServer([said(text, usage=usage)]) as server, driving(server, price=price) as driver:
        (done,) = complete(driver)
    assert (done.text, done.estimated) == (text, True)
    assert (done.prompt_tokens, done.completion_tokens, done.cost) == (7, 11, 18.0)


def test_an_estimate_is_not_above_the_longest_reply() -> None:
    with ChatServer([said("x" * 4000, usage=None)]) as server, driving(server) as driver:
        (done,) = complete(driver)
    assert done.completion_tokens == 16


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("\ud800 lone", "\ud800 lone"),
        ("nul \0", "nul \0"),
        (None, ""),
        (5, "5"),
        ([{"type": "text", "text": "x"}], '[{"type": "text", "text": "x"}]'),
    ],
)
def test_odd_contents_are_handed_on_as_text(content: Any, text: str) -> None:
    with ChatServer([said(content, usage=None)]) as server, driving(server) as driver:
        assert [x.text for x in complete(driver)] == [text]


def test_invalid_utf_8_is_replaced() -> None:
    act = Act(body=GOOD.body.replace(b"good", b"g\xff\xfe\x80d"))
    with ChatServer([act]) as server, driving(server) as driver:
        assert [x.text for x in complete(driver)] == ["g\ufffd\ufffd\ufffdd"]


def test_the_model_is_the_first_that_the_endpoint_lists() -> None:
    with ChatServer([GOOD], listing("a/b", "c")) as server, driving(server, model=None) as driver:
        (done,) = complete(driver)
        complete(driver)
    assert done.model == "a/b"
    assert [x["model"] for x in server.bodies] == ["a/b"] * 2
    assert server.listed == 1


@pytest.mark.parametrize(
    "models",
    [
        listing(),
        listing(None),
        listing(5),
        listing(""),
        listing("a\ud800"),
        listing("a\0\n"),
        listing("a" * 100_000),
        refused(404),
        refused(401),
        Act(body=b"<html>", headers={"Content-Type": "text/html"}),
        Act(body=b"{"),
        Act(body=b"[]"),
        Act(body=b'{"data":null}'),
        Act(body=b'{"data":[{}]}'),
        Act(body=b"[" * 100_000),
    ],
)
def test_a_list_without_a_model_is_tried_once_and_says_what_to_do(models: Act) -> None:
    with ChatServer([GOOD], models) as server, driving(server, model=None) as driver:
        tries, words = complete_in_vain(driver)
    assert (len(server.calls), server.listed) == (0, 1)
    assert [(x.text, x.tokens) for x in tries] == [(None, 0)]
    assert "driver.model" in words


def test_a_list_that_is_late_is_asked_for_again() -> None:
    with ChatServer([GOOD], refused(503)) as server, driving(server, model=None) as driver:
        tries, _ = complete_in_vain(driver)
        assert (len(server.calls), server.listed) == (0, len(tries)) == (0, 6)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_as_many_are_in_flight_as_the_batch_says(batch: int) -> None:
    with ChatServer([GOOD.but(delay=0.25)]) as server, driving(server, batch=batch) as driver:
        tries = complete(driver, 6)
    assert server.most_at_once == batch
    assert sorted(x.request for x in tries) == list(range(6))


def test_answers_come_as_they_end() -> None:
    def script(call: Call) -> Act:
        seed = call.body["seed"]
        return said(str(seed)).but(delay=0.2 * (4 - seed))

    requests = [ask_for(i, seed=i) for i in range(4)]
    with ChatServer(script) as server, driving(server) as driver:
        tries = list(driver.complete(requests, lambda _: True))
    assert [x.request for x in tries] == [3, 2, 1, 0]
    assert [x.text for x in tries] == ["3", "2", "1", "0"]


def test_the_others_are_answered_before_the_driver_gives_up() -> None:
    def script(call: Call) -> Act:
        return refused(403) if call.body["seed"] == 0 else GOOD.but(delay=0.2)

    with ChatServer(script) as server, driving(server) as driver:
        tries, words = complete_in_vain(driver, 4)
    assert "403" in words
    assert sorted(x.request for x in tries if x.text == "good") == [1, 2, 3]


def test_closing_early_ends_the_calls_and_leaves_the_driver_usable() -> None:
    def script(call: Call) -> Act:
        return GOOD.but(delay=PLENTY if call.body["seed"] < 3 else 0.0)

    requests = [ask_for(i, seed=i) for i in range(4)]
    with ChatServer(script) as server, driving(server) as driver:
        began = time.monotonic()
        stream = driver.complete(requests, lambda _: True)
        assert next(stream).text == "good"
        stream.close()  # type: ignore[attr-defined]
        assert [x.text for x in complete(driver)] == ["good"]
        assert time.monotonic() - began < PLENTY / 3


def test_no_requests_are_answered_by_nothing() -> None:
    with ChatServer([GOOD]) as server, driving(server) as driver:
        assert complete(driver, 0) == []


def test_close_may_be_repeated() -> None:
    with ChatServer([GOOD]) as server, driving(server) as driver:
        complete(driver)
        driver.close()


def test_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    with ChatServer([GOOD]) as server, driving(server) as driver:
        process = server._server.process_request
        monkeypatch.setattr(
            server._server, "process_request", lambda *x: (opened.append(x), process(*x))
        )
        for _ in range(5):
            complete(driver)
    assert len(opened) == 1
