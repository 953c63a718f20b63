"""Drivers in order: what the one could not answer, and nothing else, goes to the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from tenacity import wait_none

from agent.drivers import failure
from agent.drivers.api import ApiDriver
from agent.drivers.chain import ChainDriver
from agent.drivers.driver import Completion, DriverError, MayRetry, Place, Request
from agent.graph import run_search
from agent.settings import DriverSettings, Endpoint, Price
from agent.state import SearchContext
from tests.agent.drivers.chat_server import Act, Call, ChatServer, obliging, refused

Scene = Callable[..., SearchContext]

ALWAYS: MayRetry = lambda _: True  # noqa: E731


@dataclass
class Fake:
    """Replies to its requests one after the other: `.` answers, `x` fails, `!` gives up.

    After a failure it asks to try again, as often as it is allowed to.
    """

    name: str
    does: str
    asked: list[list[int]] = field(default_factory=list)
    closed: int = 0

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        self.asked.append([x.place.slot for x in requests])
        steps = iter(self.does)
        for number in range(len(requests)):
            while (step := next(steps, ".")) == "x":
                yield Completion(number, None, 1, 0, 0.0, self.name, failure="no")
                if not may_retry(number):
                    break
            if step == "!":
                raise DriverError(f"{self.name} gave up")
            if step == ".":
                yield Completion(number, self.name, 1, 1, 0.0, self.name)

    def close(self) -> None:
        self.closed += 1


def opener(driver: Fake) -> Callable[[], Fake]:
    return lambda: driver


def requests(count: int) -> list[Request]:
    return [Request(Place(0, 10 + i, "generate", 0), (), {}, 16, 0.0, 0) for i in range(count)]


def told(chain: ChainDriver, count: int, may_retry: MayRetry = ALWAYS) -> list[tuple[int, str]]:
    """Return number and text of every try; a failed one has its driver's name with an x."""
    tries = chain.complete(requests(count), may_retry)
    return [(x.request, x.text or f"x{x.model}") for x in tries]


def test_one_driver_is_enough() -> None:
    first, second = Fake("a", "..."), Fake("b", "")
    chain = ChainDriver([opener(first), opener(second)])
    assert told(chain, 3) == [(0, "a"), (1, "a"), (2, "a")]
    assert (first.asked, second.asked) == ([[10, 11, 12]], [])
    chain.close()
    assert (first.closed, second.closed) == (1, 0)


def test_only_what_is_left_is_handed_over() -> None:
    first, second, third = Fake("a", ".!"), Fake("b", ".!"), Fake("c", "")
    chain = ChainDriver([opener(x) for x in (first, second, third)])
    assert told(chain, 4) == [(0, "a"), (1, "b"), (2, "c"), (3, "c")]
    assert (first.asked, second.asked) == ([[10, 11, 12, 13]], [[11, 12, 13]])
    assert third.asked == [[12, 13]]
    assert (first.closed, second.closed, third.closed) == (1, 1, 0)


def test_who_gave_up_is_not_asked_again() -> None:
    first, second = Fake("a", "!"), Fake("b", "")
    chain = ChainDriver([opener(first), opener(second)])
    told(chain, 1)
    assert told(chain, 2) == [(0, "b"), (1, "b")]
    assert (len(first.asked), len(second.asked)) == (1, 2)


def test_when_all_gave_up_each_reason_is_told() -> None:
    drivers = [Fake("a", ".!"), Fake("b", "!")]
    chain = ChainDriver([opener(x) for x in drivers])
    tries = chain.complete(requests(2), ALWAYS)
    assert next(tries).text == "a"
    for stream in (tries, chain.complete(requests(1), ALWAYS)):
        with pytest.raises(DriverError, match=r"^a gave up; then b gave up$"):
            next(stream)
    assert [x.closed for x in drivers] == [1, 1]


def test_a_driver_that_cannot_be_opened_is_passed_over() -> None:
    def broken() -> Fake:
        raise DriverError("no server")

    chain = ChainDriver([broken, opener(Fake("b", ""))])
    assert told(chain, 1) == [(0, "b")]
    with pytest.raises(DriverError, match=r"^no server$"):
        told(ChainDriver([broken]), 1)


def test_a_wrong_setting_is_not_passed_over() -> None:
    def wrong() -> Fake:
        raise ValueError("driver.python: no such program")

    with pytest.raises(ValueError, match="no such program"):
        told(ChainDriver([wrong, opener(Fake("b", ""))]), 1)


def test_a_driver_is_opened_when_it_is_first_asked() -> None:
    opened = []

    def open_it(name: str) -> Fake:
        opened.append(name)
        return Fake(name, "")

    chain = ChainDriver([partial(open_it, "a"), partial(open_it, "b")])
    assert opened == []
    told(chain, 1)
    told(chain, 1)
    assert opened == ["a"]


def test_leave_is_asked_for_with_the_callers_numbers() -> None:
    asked = []

    def may_retry(number: int) -> bool:
        asked.append(number)
        return True

    chain = ChainDriver([opener(Fake("a", ".!")), opener(Fake("b", ".x."))])
    assert told(chain, 3, may_retry) == [(0, "a"), (1, "b"), (2, "xb"), (2, "b")]
    assert asked == [2]


def test_a_failed_try_needs_leave_before_the_next_driver_too() -> None:
    """Its worst case is no longer set aside: the next driver's try could pass a limit."""
    asked = []

    def may_retry(number: int) -> bool:
        asked.append(number)
        return asked.count(number) < 2

    first, second = Fake("a", ".x!"), Fake("b", "")
    chain = ChainDriver([opener(first), opener(second)])
    assert told(chain, 3, may_retry) == [(0, "a"), (1, "xa"), (2, "b")]
    assert asked == [1, 1]
    assert second.asked == [[12]]


def test_a_request_that_was_refused_leave_is_over() -> None:
    asked = []

    def may_retry(number: int) -> bool:
        asked.append(number)
        return len(asked) > 1

    first, second = Fake("a", "x!"), Fake("b", "")
    assert told(ChainDriver([opener(first), opener(second)]), 2, may_retry) == [
        (0, "xa"),
        (1, "b"),
    ]
    assert asked == [0]


def test_nothing_left_is_nothing_to_hand_over() -> None:
    first, second = Fake("a", "x"), Fake("b", "")
    chain = ChainDriver([opener(first), opener(second)])
    assert told(chain, 1, lambda _: False) == [(0, "xa")]
    assert told(chain, 0) == []
    assert second.asked == []


def test_closing_early_reaches_the_driver_in_charge() -> None:
    chain = ChainDriver([opener(Fake("a", "...")), opener(Fake("b", ""))])
    stream = chain.complete(requests(3), ALWAYS)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert told(chain, 1) == [(0, "a")]


def test_a_search_goes_from_one_endpoint_to_the_next(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first endpoint breaks in the middle of a batch."""
    monkeypatch.setattr(failure, "_backoff", wait_none())

    def script(call: Call) -> Act:
        return obliging(call) if call.number in (0, 1, 2, 5, 6) else refused(503)

    context = scene(allocator="llm", replies=[], tokens=10**6)
    with ChatServer(script) as first, ChatServer(obliging) as second:
        ends = [
            Endpoint(kind="api", base_url=x.url, model=name, tries=2, max_tokens=64)
            for x, name in ((first, "one"), (second, "two"))
        ]
        settings = DriverSettings(**ends[0].model_dump(), fallbacks=(ends[1],))
        chain = ChainDriver(
            [partial(ApiDriver, x, base_url=str(x.base_url), model=x.model) for x in settings.chain]
        )
        result = run_search(
            replace(context, driver=chain, driver_settings=settings),
            tmp_path / "checkpoints.sqlite",
        )
        chain.close()
    lines = context.ledger.lines()
    by = {name: [x for x in lines if x.model == name] for name in ("one", "two")}
    assert (len(by["one"]), len(by["two"])) == (len(first.calls), len(second.calls))
    assert sum(x.reply is not None for x in by["one"]) == 5
    answered = {(x.generation, x.slot, x.attempt) for x in by["one"] if x.reply is not None}
    assert not answered & {(x.generation, x.slot, x.attempt) for x in by["two"]}
    assert (result.evaluations, result.stopped) == (40, "evaluations")


def test_money_is_set_aside_for_the_dearest_of_the_chain(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first endpoint costs nothing and never answers; all money goes to the second."""
    monkeypatch.setattr(failure, "_backoff", wait_none())
    context = scene(allocator="llm", replies=[], cost=0.05)
    with ChatServer(lambda _: refused(503)) as first, ChatServer(obliging) as second:
        free, dear = (
            Endpoint(kind="api", base_url=x.url, model="m", tries=1, max_tokens=64)
            for x in (first, second)
        )
        dear = dear.model_copy(update={"price": Price(prompt=20.0, completion=20.0)})
        settings = DriverSettings(**free.model_dump(), fallbacks=(dear,))
        chain = ChainDriver(
            [partial(ApiDriver, x, base_url=str(x.base_url), model="m") for x in settings.chain],
            settings.chain,
        )
        result = run_search(
            replace(context, driver=chain, driver_settings=settings),
            tmp_path / "checkpoints.sqlite",
        )
        chain.close()
    assert result.stopped == "cost"
    assert 0 < result.llm_cost <= 0.05


def test_each_driver_samples_as_its_own_endpoint_says() -> None:
    asked: list[Request] = []

    class Listening(Fake):
        def complete(
            self, requests: Sequence[Request], may_retry: MayRetry
        ) -> Iterator[Completion]:
            asked.extend(requests)
            return super().complete(requests, may_retry)

    drivers = [Listening("first", "!"), Listening("second", ".")]
    endpoints = [
        Endpoint(max_tokens=4096, temperature=0.5),
        Endpoint(max_tokens=256, temperature=0.0),
    ]
    chain = ChainDriver([opener(x) for x in drivers], endpoints)
    request = replace(requests(1)[0], max_tokens=4096, temperature=0.5)
    assert [x.text for x in chain.complete([request], ALWAYS)] == ["second"]
    assert [(x.max_tokens, x.temperature) for x in asked] == [(4096, 0.5), (256, 0.0)]
