"""What may go wrong with a call: whether it passes, what it cost, and how long to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import httpx2
import openai
from tenacity import RetryCallState, wait_random_exponential

_PASSING = (408, 409, 429)
_OVERDUE = (408, 504)  # the endpoint may have worked on it until then
_REFUSALS = (400, 404, 415, 422, 501)
_ABOUT_REQUEST = (400, 413, 422)  # an endpoint that answers others may refuse this one
_SHOWN = 200
_backoff = wait_random_exponential(multiplier=2, max=60)


@dataclass
class CallError(Exception):
    """One call without a reply.

    Attributes:
        reason: one short line without secrets.
        may_pass: the same call may succeed later.
        may_cost: the endpoint may have worked on it, and may charge for that.
        is_refusal: the endpoint did not accept the form of the call.
        is_about_request: it may accept another request in the same form.
        delay: seconds that the endpoint asks to wait, None where it does not say.
    """

    reason: str
    may_pass: bool = True
    may_cost: bool = False
    is_refusal: bool = False
    is_about_request: bool = False
    delay: float | None = None

    def at_once(self) -> CallError:
        """Return the failure as one after which another form is tried at once."""
        return replace(self, may_pass=True, delay=0.0)


def failure_of(error: Exception, key: str) -> CallError:
    """Return what `error` of a call means; `key` is blotted out of its words.

    Raises:
        Exception: `error` itself, if it is none of a connection or an endpoint.
    """
    if isinstance(error, CallError):
        return error
    words = _one_line(error, key)
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        return CallError(
            f"{status}: {words}",
            may_pass=status in _PASSING or (status >= 500 and status != 501),
            may_cost=status in _OVERDUE,
            is_refusal=status in _REFUSALS,
            is_about_request=status in _ABOUT_REQUEST,
            delay=retry_after(error.response.headers),
        )
    if isinstance(error, TimeoutError | asyncio.TimeoutError | openai.APITimeoutError):
        return CallError("no reply within driver.timeout", may_cost=True)
    if isinstance(error, openai.APIConnectionError):
        unsent = isinstance(error.__cause__, httpx2.ConnectError)
        cause = f" ({_one_line(error.__cause__, key)})" if error.__cause__ else ""
        return CallError(f"no connection{cause}", may_cost=not unsent)
    if isinstance(error, httpx2.HTTPError | OSError):
        return CallError(f"the connection broke: {words}", may_cost=True)
    raise error


def wait_seconds(state: RetryCallState) -> float:
    """Return how long to wait before the next try: as the endpoint asks, but some time at least."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, CallError) and error.delay is not None:
        return error.delay if error.is_refusal else max(error.delay, _backoff(state))
    return float(_backoff(state))


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds of Retry-After (a number or a date) or retry-after-ms, None without.

    `now` is the time of day in seconds since 1970.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if text is None or seconds is not None:
        return seconds
    try:
        date = parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, date - (time.time() if now is None else now))


def _number(text: str | None) -> float | None:
    """Return a finite number that is not negative, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def blot(text: str, key: str) -> str:
    """Return `text` with the key blotted out."""
    return text.replace(key, "***") if key else text


def _one_line(error: BaseException, key: str) -> str:
    text = blot(" ".join(str(error).split()), key) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
