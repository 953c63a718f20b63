"""What goes wrong with calls: its words never hold the key, and a search survives a third of it."""

from __future__ import annotations

import json
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import httpx2
import openai
import pytest
from tenacity import Future, RetryCallState, wait_none

from agent.drivers import failure
from agent.drivers.api import ApiDriver, key_of
from agent.drivers.driver import Completion, DriverError, Place, Request
from agent.drivers.failure import CallError, failure_of, retry_after, wait_seconds
from agent.graph import SearchResult, run_search
from agent.settings import DriverSettings, Endpoint
from agent.state import SearchContext
from tests.agent.drivers.chat_server import (
    GARBAGE,
    Act,
    Call,
    ChatServer,
    listing,
    obliging,
    refused,
    said,
)
from tests.agent.drivers.fault_proxy import FAULTS, FaultProxy

Scene = Callable[..., SearchContext]

KEY = "sk-Zq7xW.fake_0123456789"
ADDRESS = httpx2.Request("POST", "http://host/v1/chat/completions")


def status_error(status: int, **headers: str) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=ADDRESS)
    return openai.APIStatusError("words", response=response, body=None)


def caused(cause: Exception) -> openai.APIConnectionError:
    error = openai.APIConnectionError(request=ADDRESS)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("status", range(400, 600))
def test_every_status_is_of_one_kind(status: int) -> None:
    error = failure_of(status_error(status), "")
    passing = status in {408, 409, 429} or (status >= 500 and status != 501)
    refusal = status in {400, 404, 415, 422, 501}
    assert (error.may_pass, error.is_refusal, error.may_cost) == (
        passing,
        refusal,
        status in {408, 504},
    )
    assert error.reason == f"{status}: words"


@pytest.mark.parametrize(
    ("error", "reason", "may_cost"),
    [
        (TimeoutError(), "no reply within driver.timeout", True),
        (openai.APITimeoutError(ADDRESS), "no reply within driver.timeout", True),
        (caused(httpx2.ConnectError("refused")), "no connection (refused)", False),
        (caused(httpx2.ReadError("")), "no connection (ReadError)", True),
        (httpx2.ReadError("a\nb\t\x07"), "the connection broke: a b ?", True),
        (OSError(104, "reset"), "the connection broke: [Errno 104] reset", True),
    ],
)
def test_broken_connections_may_pass(error: Exception, reason: str, may_cost: bool) -> None:
    found = failure_of(error, "")
    assert (found.reason, found.may_pass, found.may_cost) == (reason, True, may_cost)
    assert not found.is_refusal


def test_what_is_not_of_a_call_is_handed_on() -> None:
    for error in (ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            failure_of(error, "")
    known = CallError("known")
    assert failure_of(known, "") is known


def test_a_reason_is_one_short_line() -> None:
    reason = failure_of(OSError("a\n\r\0\ud800\u2028" + "x" * 1000), "").reason
    assert len(reason) <= 250
    assert reason.isprintable()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 2.5 "}, 2.5),
        ({"retry-after-ms": "1500", "retry-after": "3"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "3"}, 3.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": formatdate(1_000_060, usegmt=True)}, 60.0),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "Fri, 99 Foo 2026 25:61:61 GMT"}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=1_000_000) == seconds


def waited(error: CallError, attempt: int = 1) -> float:
    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempt
    state.outcome = Future(1)
    state.outcome.set_exception(error)
    return wait_seconds(state)


def test_the_endpoint_is_waited_for_and_another_form_is_not() -> None:
    assert waited(CallError("x", delay=40.0)) == 40.0
    for _ in range(20):
        assert 0 <= waited(CallError("x")) <= 2
        assert 0.1 <= waited(CallError("x", delay=0.1)) <= 2
    first, late = ([waited(CallError("x"), attempt) for _ in range(50)] for attempt in (1, 20))
    assert max(first) > 0.2
    assert 10 < max(late) <= 60
    refusal = CallError("x", may_pass=False, is_refusal=True, delay=9.0).at_once()
    assert (refusal.may_pass, waited(refusal)) == (True, 0.0)


# The key.


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_backoff", wait_none())


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """The variable that holds the key, with logs on and nothing of it in them.

    Of httpcore2 only from INFO on: at DEBUG it logs whatever headers an endpoint sends.
    """
    monkeypatch.setattr(failure, "_backoff", wait_none())
    monkeypatch.setenv("FAKE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="httpcore2")
    yield "FAKE_KEY"
    assert KEY not in caplog.text


def driver_of(server: ChatServer, variable: str, model: str | None = "m") -> ApiDriver:
    settings = Endpoint(
        kind="api", base_url=server.url, key_variable=variable, tries=3, timeout=5.0
    )
    return ApiDriver(settings, base_url=server.url, model=model, key=key_of(settings))


def outcome(driver: ApiDriver) -> tuple[list[Completion], BaseException | None]:
    place, message = Place(0, 0, "generate", 0), {"role": "user", "content": "Hi!"}
    request = Request(place, (message,), {"type": "object"}, 16, 0.5, 7)
    tries: list[Completion] = []
    try:
        tries.extend(driver.complete([request], lambda _: True))
    except DriverError as error:
        return tries, error
    finally:
        driver.close()
    return tries, None


def echo(call: Call) -> str:
    """Return what the server knows of the key."""
    return call.headers["authorization"]


ECHOES: dict[str, Callable[[Call], Act]] = {
    "refusal": lambda x: refused(401, f"{echo(x)} is wrong"),
    "refused form": lambda x: refused(400, f"{echo(x)} is wrong"),
    "trouble": lambda x: refused(503, f"{echo(x)} is wrong"),
    "plain refusal": lambda x: Act(403, echo(x).encode(), {"Content-Type": "text/plain"}),
    "long refusal": lambda x: refused(401, echo(x) * 20),
    "split by the limit": lambda x: refused(401, "x" * 150 + echo(x)),
    "garbage": lambda x: Act(bare=True, body=echo(x).encode() + b"\r\n\r\n"),
    "bad header": lambda x: Act(bare=True, body=b"HTTP/1.1 200 OK\r\n" + echo(x).encode()),
    "redirect": lambda x: Act(307, b"", {"Location": f"ftp://{echo(x)[7:]}/"}),
    "no completion": lambda x: Act(body=echo(x).encode()),
    "reply": lambda x: said(f"Your key is {echo(x)}."),
}


@pytest.mark.parametrize("name", ECHOES)
def test_an_echoed_key_is_nowhere(
    name: str, keyed: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(ECHOES[name]) as server:
        driver = driver_of(server, keyed)
        tries, error = outcome(driver)
    assert {echo(x) for x in server.calls} == {f"Bearer {KEY}"}
    assert tries
    told = [repr(tries), repr(driver), caplog.text, *capfd.readouterr()]
    assert (error is None) == (name == "reply")
    while error is not None:
        told += [str(error), repr(error), *traceback.format_exception(error)]
        error = error.__context__
    assert not [x for x in told if KEY in x or "sk-Zq7x" in x]
    if name in {"refusal", "reply"}:
        assert "***" in repr(tries)


def test_a_key_echoed_as_a_models_name_is_nowhere(keyed: str) -> None:
    with ChatServer([said("x")], listing(f"model-{KEY}")) as server:
        tries, _ = outcome(driver_of(server, keyed, model=None))
    assert [x.model for x in tries] == ["model-***"]


def test_a_key_that_is_not_set_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-endpoint")
    monkeypatch.delenv("FAKE_KEY", raising=False)
    with ChatServer([said("x")]) as server:
        tries, _ = outcome(driver_of(server, "FAKE_KEY"))
        monkeypatch.setenv("FAKE_KEY", "")
        outcome(driver_of(server, "FAKE_KEY"))
    assert [x.text for x in tries] == ["x"]
    assert [echo(x) for x in server.calls] == ["Bearer none"] * 2


def test_space_around_a_key_is_not_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `export KEY="$(cat file)\\n"` leaves it: no header could hold it."""
    monkeypatch.setenv("FAKE_KEY", f" {KEY}\r\n")
    with ChatServer([said("x")]) as server:
        tries, _ = outcome(driver_of(server, "FAKE_KEY"))
    assert [x.text for x in tries] == ["x"]
    assert echo(server.calls[0]) == f"Bearer {KEY}"


@pytest.mark.parametrize("wrong", ["\n", "é", " ", "\x07", "'", '"', "\\"])
def test_what_errors_would_quote_is_refused_without_being_told(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """No header holds the first ones; the others look different in an error than in the key."""
    monkeypatch.setenv("FAKE_KEY", KEY + wrong + KEY)
    settings = Endpoint(kind="api", base_url="http://127.0.0.1/v1", key_variable="FAKE_KEY")
    with pytest.raises(ValueError, match=r"driver\.key_variable: FAKE_KEY holds") as raised:
        key_of(settings)
    assert KEY not in repr(raised.value)


# Anything that is sent.


@pytest.mark.usefixtures("_quick")
def test_no_bytes_of_an_endpoint_raise_anything_but_a_driver_error() -> None:
    rng = random.Random(0)
    good = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    good += (
        b"Location: http://[::1]:x/\r\nTransfer-Encoding: chunked\r\nRetry-After: 0\r\n\r\n5\r\n"
    )
    good += said("x").body + b"\r\n0\r\n\r\n"

    def script(call: Call) -> Act:
        if call.number % 10 == 9:
            return said("x")
        raw = bytearray(good)
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 3))
        raw[9:12] = str(rng.choice([200, 204, 304, 307, 400, 401, 429, 500, 999])).encode()
        return Act(bare=True, body=bytes(raw[: rng.randint(1, len(raw))]))

    with ChatServer(script) as server:
        outcomes = [outcome(driver_of(server, "UNSET_KEY")) for _ in range(100)]
    assert {type(x) for _, x in outcomes} == {DriverError, type(None)}
    assert sum(len(tries) for tries, _ in outcomes) >= 150


# Whole searches.


def searching(
    context: SearchContext, server: ChatServer, folder: Path, **settings: object
) -> SearchResult:
    """Run the search of `context` with a driver at `server`."""
    known = context.driver_settings.model_dump(include={"max_tokens", "when_down"})
    chosen = DriverSettings.model_validate(
        {"kind": "api", "base_url": server.url, **known, **settings}
    )
    driver = ApiDriver(chosen, base_url=server.url, model="m")
    try:
        return run_search(
            replace(context, driver=driver, driver_settings=chosen), folder / "checkpoints.sqlite"
        )
    finally:
        driver.close()


def check_ledger(context: SearchContext, proxy: ChatServer) -> Counter[str]:
    """Check that each call is on file once and each question answered once; count outcomes."""
    lines = context.ledger.lines()
    made = [x for x in lines if not x.is_skipped]
    assert len(made) == len(proxy.calls)
    places = Counter((x.generation, x.slot, x.attempt) for x in made if x.reply is not None)
    assert set(places.values()) == {1}
    numbers = Counter((x.generation, x.slot, x.attempt, x.call) for x in lines)
    assert set(numbers.values()) == {1}
    assert all(x.tokens == 0 for x in lines if x.is_skipped)
    return Counter(x.outcome.partition(":")[0] for x in lines)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(("strategy", "seed"), [("moves", 0), ("moves", 1), ("paper", 0)])
def test_a_search_with_faults_keeps_every_promise(
    scene: Scene, tmp_path: Path, seed: int, strategy: str
) -> None:
    context = scene(
        allocator="llm", replies=[], strategy=strategy, evaluations=40, tokens=10**6, seed=seed
    )
    began = time.monotonic()
    with (
        ChatServer(obliging) as upstream,
        FaultProxy(upstream.url, timeout=1.0, seed=seed) as proxy,
    ):
        result = searching(context, proxy, tmp_path, timeout=1.0, tries=12)
    outcomes = check_ledger(context, proxy)
    faults = proxy.drawn.total() - proxy.drawn[""]
    assert (result.evaluations, result.stopped) == (40, "evaluations")
    assert result.llm_calls == proxy.drawn.total() == len(proxy.calls)
    assert result.llm_failures == outcomes["failed"] >= faults >= 10
    assert len(proxy.drawn) > 5
    assert result.origins["llm"] + result.origins.get("llm_repaired", 0) >= 10
    assert result.llm_tokens == sum(x.tokens for x in context.ledger.lines()) <= 10**6
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("limit", "value"), [("tokens", 9000), ("tokens", 20_000), ("calls", 25), ("cost", 0.5)]
)
def test_faults_never_carry_a_search_past_its_limits(
    scene: Scene, tmp_path: Path, limit: str, value: float
) -> None:
    """With all faults that are charged by estimate, and half of the calls among them."""
    context = scene(allocator="llm", replies=[], evaluations=400, **{limit: value})
    price = {"prompt": 20.0, "completion": 20.0}
    faults = ("reset", "half", "500")
    with (
        ChatServer(obliging) as upstream,
        FaultProxy(upstream.url, timeout=9.0, seed=3, share=0.5, faults=faults) as proxy,
    ):
        result = searching(context, proxy, tmp_path, timeout=9.0, tries=12, price=price)
    outcomes = check_ledger(context, proxy)
    assert result.stopped == limit
    assert value / 3 < getattr(result, f"llm_{limit}") <= value
    assert outcomes["failed"] > 3
    assert outcomes["skipped"] > 0


@pytest.mark.usefixtures("_quick")
def test_a_search_stops_when_the_endpoint_is_gone_and_goes_on_when_it_is_back(
    scene: Scene, tmp_path: Path
) -> None:
    whole = scene(allocator="llm", replies=[], folder=tmp_path / "whole")
    with ChatServer(obliging) as server:
        searching(whole, server, tmp_path / "whole")
    folder = tmp_path / "cut"
    answered = 0
    for good in (0, 3, 11, 17):

        def script(call: Call, good: int = good) -> Act:
            return obliging(call) if call.number < good else refused(503)

        context = scene(allocator="llm", replies=[], folder=folder)
        with ChatServer(script) as server, pytest.raises(DriverError, match="503"):
            searching(context, server, folder, tries=2)
        answered += good
        assert sum(x.reply is not None for x in context.ledger.lines()) == answered
    context = scene(allocator="llm", replies=[], folder=folder)
    with ChatServer(obliging) as server:
        searching(context, server, folder)
    assert len(server.calls) + answered == len(whole.ledger.lines())
    assert [x.key for x in context.ledger.candidates()] == [
        x.key for x in whole.ledger.candidates()
    ]


@pytest.mark.usefixtures("_quick")
def test_when_down_a_search_may_go_on_without_an_llm(scene: Scene, tmp_path: Path) -> None:
    def script(call: Call) -> Act:
        return obliging(call) if call.number < 10 else GARBAGE

    context = scene(allocator="llm", replies=[], when_down="classical")
    with ChatServer(script) as server:
        result = searching(context, server, tmp_path, tries=2, timeout=5.0)
    assert (result.evaluations, result.stopped) == (40, "evaluations")
    assert result.origins["fallback"] > 20
    assert result.origins["llm"] >= 1
    check_ledger(context, server)
    # Failed calls are charged to the candidate that was made in the end.
    charged = sum(x.tokens for x in context.ledger.lines() if x.operator != "select")
    assert sum(x.tokens for x in context.ledger.candidates()) == charged


def test_the_faults_are_what_they_are_called() -> None:
    """A proxy that did no harm would prove nothing."""
    timeout = 0.5
    with ChatServer([said("x")]) as upstream:
        for fault in FAULTS:
            with FaultProxy(
                upstream.url, timeout=timeout, seed=0, share=1.0, faults=[fault]
            ) as proxy:
                settings = Endpoint(kind="api", base_url=proxy.url, timeout=timeout, tries=1)
                driver = ApiDriver(settings, base_url=proxy.url, model="m")
                tries, error = outcome(driver)
            assert len(tries) == 1
            assert tries[0].text is None
            assert isinstance(error, DriverError)
            assert proxy.drawn == {fault: 1}
    assert json.loads(said("x").body)["choices"]
