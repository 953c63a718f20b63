"""Questions to the driver: one batch, strict reading, one repair round, every attempt logged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from agent.briefing import common
from agent.drivers.driver import Message, Request
from agent.ledger import LlmLine
from agent.parse import ReplyError, Schema
from agent.state import SearchContext

T = TypeVar("T")

_QUOTED = 400  # characters of a bad reply that the repair round repeats
_TEMPLATE_TOKENS = 64  # at most what a chat template adds to a prompt
_SEED_STREAM = 7_919  # keeps the driver's seeds apart from the classical operators'


class DuplicateError(Exception):
    """The reply is in order, but its plan is known already; asking again would not help."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """One slot's prompt, the schema of its reply and how to read it.

    `interpret` raises ReplyError for a reply to be repaired, DuplicateError for one to be dropped.
    """

    slot: int
    operator: str
    messages: tuple[Message, ...]
    schema: Schema
    interpret: Callable[[str], T]


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a question came to: a value or None, over all attempts."""

    value: T | None = None
    repaired: bool = False
    tokens: int = 0


def ask(
    context: SearchContext, generation: int, questions: Sequence[Question[T]]
) -> list[Answer[T]]:
    """Return an answer to each question, all of one operator, after at most one repair each.

    The limit on tokens is never passed: an attempt that might pass it is skipped.
    """
    answers: list[Answer[T]] = [Answer() for _ in questions]
    if not questions:
        return answers
    spent = context.ledger.tokens_before(generation, questions[0].operator)
    waiting = dict(enumerate(questions))
    for attempt in (0, 1):
        affordable = _affordable(context, waiting, spent)
        _log_skipped(context, generation, attempt, waiting, affordable)
        lines = _attempts(context, generation, attempt, affordable)
        waiting = {}
        for i, line in lines.items():
            tokens = answers[i].tokens + line.tokens
            spent += line.tokens
            reading = _read(questions[i], line)
            value, outcome, repair = reading
            _log(context, replace(line, outcome=outcome))
            answers[i] = Answer(value, attempt == 1, tokens)
            if repair is not None:
                waiting[i] = _repair(context, questions[i], line, repair)
    return answers


def _read(question: Question[T], line: LlmLine) -> tuple[T | None, str, str | None]:
    """Return the value, the outcome and, where a repair may help, what is wrong."""
    try:
        return question.interpret(line.reply or ""), "accepted", None
    except DuplicateError as error:
        return None, f"duplicate: {error}", None
    except ReplyError as error:
        return None, f"invalid: {error}", str(error)


def _attempts(
    context: SearchContext, generation: int, attempt: int, questions: dict[int, Question[T]]
) -> dict[int, LlmLine]:
    """Return one line a question; replies that the ledger has are taken from there."""
    lines: dict[int, LlmLine] = {}
    fresh: list[int] = []
    for i, question in questions.items():
        digest = _digest(question.messages)
        known = context.ledger.reply(generation, question.slot, attempt, digest)
        if known is not None and known.reply is not None:
            lines[i] = known
        else:
            fresh.append(i)
    requests = [_request(context, generation, attempt, questions[i]) for i in fresh]
    if requests:
        if context.driver is None:
            raise ValueError("search.allocator: llm needs a driver, driver.kind is none")
        for i, completion in zip(fresh, context.driver.complete(requests), strict=True):
            question = questions[i]
            lines[i] = LlmLine(
                generation=generation,
                slot=question.slot,
                operator=question.operator,
                attempt=attempt,
                prompt_hash=_digest(question.messages),
                messages=question.messages,
                reply=completion.text,
                tokens=completion.prompt_tokens + completion.completion_tokens,
                seconds=completion.seconds,
                outcome="",
            )
    return dict(sorted(lines.items()))


def _request(
    context: SearchContext, generation: int, attempt: int, question: Question[T]
) -> Request:
    key = (context.seed, generation, question.slot, _SEED_STREAM, attempt)
    return Request(
        messages=question.messages,
        schema=question.schema,
        max_tokens=context.driver_settings.max_tokens,
        temperature=context.driver_settings.temperature,
        seed=int(np.random.default_rng(key).integers(2**31)),
    )


def _repair(
    context: SearchContext, question: Question[T], line: LlmLine, error: str
) -> Question[T]:
    """Return the question again, with the bad reply and what is wrong with it."""
    assert context.strategy is not None
    values = {**common(context), "error": error, "example": ""}
    reply = (line.reply or "")[:_QUOTED] or "(nothing)"
    added = (
        {"role": "assistant", "content": reply},
        {"role": "user", "content": context.strategy.render("repair", values)},
    )
    return replace(question, messages=question.messages + added)


def _affordable(
    context: SearchContext, questions: dict[int, Question[T]], spent: int
) -> dict[int, Question[T]]:
    """Return the first questions whose worst case stays within the limit on tokens."""
    limit = context.settings.tokens
    if limit is None:
        return questions
    result: dict[int, Question[T]] = {}
    for i, question in questions.items():
        # A token is at least one byte of the prompt, so bytes bound tokens from above.
        prompt = sum(len(m["content"].encode()) for m in question.messages)
        spent += prompt + _TEMPLATE_TOKENS + context.driver_settings.max_tokens
        if spent > limit:
            break
        result[i] = question
    return result


def _log_skipped(
    context: SearchContext,
    generation: int,
    attempt: int,
    questions: dict[int, Question[T]],
    affordable: dict[int, Question[T]],
) -> None:
    for i, question in questions.items():
        if i not in affordable:
            digest = _digest(question.messages)
            place = (generation, question.slot, question.operator, attempt, digest)
            outcome = "skipped: it might pass search.tokens"
            _log(context, LlmLine(*place, question.messages, None, 0, 0.0, outcome))


def _log(context: SearchContext, line: LlmLine) -> None:
    """Write the line unless an earlier process did."""
    if context.ledger.reply(line.generation, line.slot, line.attempt, line.prompt_hash):
        return
    context.ledger.add_line(line)
    context.on_event(
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


def _digest(messages: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
