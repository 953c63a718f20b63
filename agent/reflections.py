"""What the driver expected, what was measured, and what it learned: told to later generations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from agent.candidate import Candidate
from agent.ledger import ORDER, LlmLine
from agent.parse import parse_words
from agent.reply import ReplyError
from agent.trajectory import effect
from agent.view import View

_EFFECTS = 6
_LESSONS = 5
_LONGEST = 120  # characters of a hypothesis or a lesson that are told
_UNTOLD = frozenset("{}[]<>|`\\")  # what could pass for a placeholder or a mark of a template


def effects(view: View) -> str:
    """Return the last changes with hypothesis and measured effect, the most harmful first."""
    changed = islice(_changed(view), _EFFECTS)
    told = sorted((_effect(view, x, hypothesis) for x, hypothesis in changed), reverse=True)
    return "\n".join(text for _, _, text in told)


def lessons(view: View) -> str:
    """Return the last distinct lessons, the latest last."""
    found: dict[str, str] = {}
    for _, words in _replies(view):
        lesson = plain(words.get("lesson", ""))
        if lesson:
            found.setdefault(lesson.casefold(), lesson)
        if len(found) == _LESSONS:
            break
    return "\n".join(f"- {x}" for x in reversed(found.values()))


def plain(text: str) -> str:
    """Return text of a reply as one short line without control characters and brackets."""
    kept = "".join(x if x.isprintable() and x not in _UNTOLD else " " for x in text)
    return " ".join(kept.split())[:_LONGEST].rstrip()


def measured(view: View) -> list[Candidate]:
    """Return the candidates of which the effects tell the fitness."""
    changed = [x for x, _ in islice(_changed(view), _EFFECTS)]
    return [y for x in changed for y in (x, view.origin_of(x)) if y is not None]


def _changed(view: View) -> Iterator[tuple[Candidate, str]]:
    """Yield each candidate that was proposed with a hypothesis, and that, the latest first."""
    made = {
        (x.generation, x.slot, x.operator): x
        for x in view.past.values()
        if x.origin in ("llm", "llm_repaired")
    }
    for line, words in _replies(view):
        candidate = made.get(_place(line))
        if candidate is not None and "hypothesis" in words:
            yield candidate, plain(words["hypothesis"])


def _effect(view: View, candidate: Candidate, hypothesis: str) -> tuple[float, int, str]:
    """Return the rise of the fitness, the id and the text of a change, all as told."""
    origin, candidate = view.origin_of(candidate), view.seen(candidate)
    if origin is None:
        rise, text = 0.0, f"plan {candidate.id}: {candidate.fitness:.4g}"
    else:
        before = view.seen(origin)
        rise = candidate.fitness - before.fitness
        text = f"{effect(view, candidate, before)}, {'better' if rise < 0 else 'no better'}"
    return rise, candidate.id, f"{text}; hypothesis: {hypothesis or 'none'}"


def _replies(view: View) -> Iterator[tuple[LlmLine, dict[str, str]]]:
    """Yield accepted replies of earlier generations and their words, the latest first."""
    context = view.context
    assert context.strategy is not None
    # Lines are in the order in which calls ended, which a rerun need not repeat.
    lines = {
        _place(x): x
        for x in context.ledger.lines()
        if x.generation < view.generation and x.outcome.startswith("accepted")
    }
    for line in sorted(lines.values(), key=_order, reverse=True):
        words, form = context.strategy.words(line.operator), context.strategy.forms[line.operator]
        try:
            yield line, parse_words(line.reply or "", form, context.reply_bounds, words)
        except ReplyError:
            continue  # another strategy asked for it


def _place(line: LlmLine) -> tuple[int, int, str]:
    return line.generation, line.slot, line.operator


def _order(line: LlmLine) -> tuple[int, int, int]:
    return line.generation, ORDER.index(line.operator), line.slot
