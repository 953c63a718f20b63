"""The contract of a driver: requests in, tries at them out, as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]


class DriverError(ConnectionError):
    """The driver gave up; what it had answered is kept, and the run may go on later."""


@dataclass(frozen=True)
class Place:
    """Which attempt of a search a request is: all that identifies it in a recording."""

    generation: int
    slot: int
    operator: str
    attempt: int


@dataclass(frozen=True)
class Request:
    """One question to an LLM.

    Attributes:
        place: where in the search it stands.
        messages: `{"role": "system" | "user" | "assistant", "content": text}` in order.
        schema: JSON schema of the reply; empty for free text.
        max_tokens: longest reply, at least 1.
        temperature: 0 takes the likeliest token.
        seed: equal requests with equal seeds get equal replies where the driver can.
    """

    place: Place
    messages: tuple[Message, ...]
    schema: dict[str, Any]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Completion:
    """One try at one request.

    Attributes:
        request: number of the request in its batch.
        text: the reply as it came (it may be cut off), None where the try failed.
        prompt_tokens, completion_tokens: as the endpoint counts them.
        seconds: this try's time, or its share of the time of its batch.
        model: who answered.
        cost: money, in the currency of the driver's price.
        estimated: the tokens are a guess, because no usage came back.
        failure: what went wrong where `text` is None, one line without secrets.
    """

    request: int
    text: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    model: str
    cost: float = 0.0
    estimated: bool = False
    failure: str = ""

    @property
    def tokens(self) -> int:
        """Prompt and reply together."""
        return self.prompt_tokens + self.completion_tokens


MayRetry = Callable[[int], bool]


class Driver(Protocol):
    """An LLM that answers batches of requests."""

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield every try as it ends, in any order; the last one of each request has a text.

        A failed try of request i may be followed by another one only if `may_retry(i)`, asked
        after that failed try was yielded, is true; a request refused so ends with its failure, and
        so does one that no try can answer though the driver is well.

        Raises:
            DriverError: no further try would help; the batch's other tries were yielded.
        """
        ...

    def close(self) -> None:
        """Release what the driver holds; it is not used afterwards."""
        ...
