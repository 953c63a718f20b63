"""Questions to the driver: one batch, strict reading, one repair round, every call logged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from agent.briefing import common
from agent.budget import Purse
from agent.drivers.driver import Completion, DriverError, Message, Place, Request
from agent.ledger import Charge, LlmLine
from agent.parse import Schema
from agent.reply import ReplyError, clean
from agent.state import SearchContext

T = TypeVar("T")

_QUOTED = 400  # characters of a bad reply that the repair round repeats
_TEMPLATE_TOKENS = 128  # at most what a chat template and words about the schema add to a prompt
_SEED_STREAM = 7_919  # keeps the driver's seeds apart from the classical operators'


@dataclass(frozen=True)
class Question(Generic[T]):
    """One slot's prompt, the schema of its reply, a tiny reply, and how to read one.

    `interpret` depends on the reply alone and raises ReplyError for one to be repaired.
    """

    slot: int
    operator: str
    messages: tuple[Message, ...]
    schema: Schema
    example: str
    interpret: Callable[[str], T]


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a question came to, over all attempts; `asked` is False where a limit forbade it."""

    value: T | None = None
    repaired: bool = False
    tokens: int = 0
    asked: bool = True


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What a reply says: a value, or what is wrong with it."""

    value: T | None = None
    problem: str | None = None


def ask(
    context: SearchContext, generation: int, questions: Sequence[Question[T]]
) -> list[Answer[T]]:
    """Return an answer to each question, all of one operator, after at most one repair each.

    No limit is ever passed: a call that might pass one is skipped. Each call is in the ledger as
    soon as it ends.

    Raises:
        DriverError: all drivers gave up and `driver.when_down` is stop.
    """
    answers: list[Answer[T]] = [Answer() for _ in questions]
    if not questions:
        return answers
    purse = context.spending.purse(generation, questions[0].operator)
    waiting = dict(enumerate(questions))
    for attempt in (0, 1):
        calls = _Calls(context, purse, generation, attempt, waiting)
        calls.make()
        waiting = {}
        for i in calls.questions:
            tokens, line = answers[i].tokens + calls.tokens[i], calls.replies.get(i)
            if line is None:
                answers[i] = Answer(tokens=tokens, asked=attempt == 1 or i not in calls.skipped)
                continue
            reading: Reading[T] = _read(questions[i], line.reply or "")
            answers[i] = Answer(reading.value, attempt == 1, tokens)
            if reading.problem is not None:
                waiting[i] = _repair(context, questions[i], line, reading.problem)
    return answers


class _Calls(Generic[T]):
    """The calls of one attempt: known ones from the ledger, the others by the driver."""

    def __init__(
        self,
        context: SearchContext,
        purse: Purse,
        generation: int,
        attempt: int,
        questions: dict[int, Question[T]],
    ) -> None:
        self.context, self.purse, self.questions = context, purse, questions
        self.generation, self.attempt = generation, attempt
        self.replies: dict[int, LlmLine] = {}
        self.skipped: set[int] = set()
        self.waiting: list[int] = []
        self.tokens = dict.fromkeys(questions, 0)

    def make(self) -> None:
        """Make the calls that may be made and are not on file."""
        for i in self.questions:
            for line in self._on_file(i):
                self._count(i, line)
        done = self.replies.keys() | self.skipped
        self.waiting = [i for i in self.questions if i not in done]
        try:
            while wave := self._wave():
                for completion in self._completions(wave):
                    i = wave[completion.request]
                    self._log(self._line(i, completion))
                    self._count(i, self._on_file(i)[-1])
        except DriverError as error:
            if self.context.driver_settings.when_down == "stop":
                raise
            _tell({"kind": "down", "reason": str(error)})

    def _wave(self) -> list[int]:
        """Take from those waiting the calls that can be paid together, in order, at their worst.

        The next one waits until these are settled; one that does not fit even then is skipped.
        What is skipped therefore depends on what earlier calls did cost, not on waves.
        """
        wave: list[int] = []
        while self.waiting:
            limit = self._limit(self.waiting[0])
            if limit is not None and wave:
                break
            i = self.waiting.pop(0)
            if limit is None:
                wave.append(i)
            else:
                self._skip(i, limit)
        return wave

    def _completions(self, wave: list[int]) -> Iterator[Completion]:
        """Yield the tries of the driver at the questions of `wave`."""
        assert self.context.driver is not None
        requests = [self._request(self.questions[i]) for i in wave]
        yield from self.context.driver.complete(requests, lambda r: self._may_retry(wave[r]))

    def _may_retry(self, i: int) -> bool:
        """Return whether a failed call may be made again now; its worst case is set aside anew.

        Where other calls are in the way it waits until they are settled.
        """
        limit = self._limit(i)
        if limit is not None and self.purse.is_idle:
            self._skip(i, limit)
        elif limit is not None:
            self.waiting = sorted([*self.waiting, i])
        return limit is None

    def _limit(self, i: int) -> str | None:
        """Set aside the worst case of a call, or return the limit that it might pass."""
        if self.context.spending.is_late:
            return "seconds"
        return self.purse.reserve(i, _worst(self.context, self.questions[i]))

    def _skip(self, i: int, limit: str) -> None:
        """Log that a call is not made."""
        self.skipped.add(i)
        nothing = Completion(i, None, 0, 0, 0.0, "")
        self._log(replace(self._line(i, nothing), outcome=f"skipped: search.{limit}"))

    def _on_file(self, i: int) -> Sequence[LlmLine]:
        question = self.questions[i]
        digest = _digest(question.messages)
        return self.context.ledger.attempts(self.generation, question.slot, self.attempt, digest)

    def _count(self, i: int, line: LlmLine) -> None:
        """Charge a call and keep its reply."""
        if line.is_skipped:
            self.skipped.add(i)
            return
        self.purse.settle(i, line.charge)
        self.tokens[i] += line.tokens
        if line.reply is not None:
            self.replies[i] = line

    def _log(self, line: LlmLine) -> None:
        self.context.ledger.add_line(line)
        _tell(
            {
                "kind": "llm",
                "generation": line.generation,
                "slot": line.slot,
                "operator": line.operator,
                "attempt": line.attempt,
                "tokens": line.tokens,
                "outcome": line.outcome,
            }
        )

    def _request(self, question: Question[T]) -> Request:
        place = Place(self.generation, question.slot, question.operator, self.attempt)
        key = (self.context.seed, self.generation, question.slot, _SEED_STREAM, self.attempt)
        return Request(
            place=place,
            messages=question.messages,
            schema=question.schema,
            max_tokens=self.context.driver_settings.max_tokens,
            temperature=self.context.driver_settings.temperature,
            seed=int(np.random.default_rng(key).integers(2**31)),
        )

    def _line(self, i: int, completion: Completion) -> LlmLine:
        """Return the line of a call; its outcome depends on the reply alone."""
        question, reply = self.questions[i], completion.text
        if reply is None:
            outcome = f"failed: {completion.failure}"
        else:
            reply = clean(reply)
            problem = _read(question, reply).problem
            outcome = "accepted" if problem is None else f"invalid: {problem}"
        return LlmLine(
            generation=self.generation,
            slot=question.slot,
            operator=question.operator,
            attempt=self.attempt,
            call=len(self._on_file(i)),
            prompt_hash=_digest(question.messages),
            messages=question.messages,
            reply=reply,
            tokens=completion.tokens,
            estimated=completion.estimated,
            cost=completion.cost,
            seconds=completion.seconds,
            model=completion.model,
            outcome=outcome,
        )


def _read(question: Question[T], reply: str) -> Reading[T]:
    try:
        return Reading(question.interpret(reply))
    except ReplyError as error:
        return Reading(problem=str(error))


def _tell(event: dict[str, Any]) -> None:
    """Write an event to the stream of the graph that runs this."""
    from langgraph.config import get_stream_writer  # a second, and none of it for an estimate

    get_stream_writer()(event)


def _repair(
    context: SearchContext, question: Question[T], line: LlmLine, problem: str
) -> Question[T]:
    """Return the question again, with the bad reply and what is wrong with it."""
    assert context.strategy is not None
    values = {**common(context), "error": problem, "example": question.example}
    reply = (line.reply or "")[:_QUOTED] or "(nothing)"
    added = (
        {"role": "assistant", "content": reply},
        {"role": "user", "content": context.strategy.render("repair", values)},
    )
    return replace(question, messages=question.messages + added)


def _worst(context: SearchContext, question: Question[T]) -> Charge:
    """Return the most that one call can cost.

    A token is at least one byte of the prompt, so bytes bound tokens from above. Where an endpoint
    has no other way the prompt tells the schema, too.
    """
    told = [*(m["content"] for m in question.messages), json.dumps(question.schema)]
    prompt = sum(len(x.encode()) for x in told) + _TEMPLATE_TOKENS
    reply = context.driver_settings.max_tokens
    cost = max(x.price.of(prompt, reply) for x in context.driver_settings.chain)
    return Charge(1, prompt + reply, cost)


def _digest(messages: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
