"""The JSON object that a reply is or holds; replies are untrusted text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

MAX_CHARACTERS = 20_000

_POSITIONS = 32  # places where an object may begin that are tried
_THINK, _END_THINK = "<think>", "</think>"


class ReplyError(ValueError):
    """What is wrong with a reply, in one sentence that the model is shown."""


def clean(text: str) -> str:
    """Return `text` with NULs and lone surrogates replaced, so that UTF-8 can hold it."""
    units = text.replace("\0", "\ufffd").encode("utf-16-le", "surrogatepass")
    return units.decode("utf-16-le", "replace")


def find_object(text: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object that is all of `text`, or else the first one in it with `keys`.

    The second way is for endpoints without structured output: prose, code fences and thoughts
    before `</think>` may stand around the object.

    Raises:
        ReplyError: there is no object with exactly `keys`, one names a key twice, or the text is
            too long, nested too deep, or holds NaN or a number too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise ReplyError(f"The reply has {len(text)} characters, allowed {MAX_CHARACTERS}.")
    try:
        found = [_DECODER.decode(text.strip())]
    except json.JSONDecodeError as error:
        problem = f"The reply is not one JSON object: {error.msg} at character {error.pos}."
        found = list(_objects(_answer(text)))
        if not found:
            raise ReplyError(problem) from None
    except ReplyError:
        raise
    except (ValueError, RecursionError):
        raise ReplyError(_UNREADABLE) from None
    for data in found:
        if isinstance(data, dict) and set(data) == set(keys):
            return data
    raise ReplyError(f"The reply is {short(found[0])}, want an object with {', '.join(keys)}.")


def short(value: Any) -> str:
    """Return `value` as JSON of at most 40 characters."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "a number too long"
    return text if len(text) <= 40 else text[:37] + "..."


def _answer(text: str) -> str:
    """Return `text` without thoughts; one that does not end is a draft to its end."""
    after = text[text.rfind(_END_THINK) + len(_END_THINK) :] if _END_THINK in text else text
    return after.partition(_THINK)[0]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in `text` that stand in no other, from its first `{` on."""
    start = text.find("{")
    for _ in range(_POSITIONS):
        if start < 0:
            return
        try:
            data, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError:
            end = start + 1
        except ReplyError:
            raise
        except (ValueError, RecursionError):
            raise ReplyError(_UNREADABLE) from None
        else:
            yield data
        start = text.find("{", end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ReplyError("The reply has the same key twice in one object.")
    return data


def _refuse_constant(name: str) -> None:
    raise ReplyError(f"The reply holds {name}, want whole numbers only.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_UNREADABLE = "The reply holds a number too long or is nested too deep."
