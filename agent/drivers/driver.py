"""The contract of a driver: requests in, completions out, one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]


@dataclass(frozen=True)
class Request:
    """One question to an LLM.

    Attributes:
        messages: `{"role": "system" | "user" | "assistant", "content": text}` in order.
        schema: JSON schema of the reply; empty for free text.
        max_tokens: longest reply, at least 1.
        temperature: 0 takes the likeliest token.
        seed: equal requests with equal seeds get equal replies where the driver can.
    """

    messages: tuple[Message, ...]
    schema: dict[str, Any]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Completion:
    """One reply: `text` as it came (it may be cut off), its cost, and the model's name.

    `seconds` is this reply's share of the time of its batch.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    model: str


class Driver(Protocol):
    """An LLM that answers batches of requests."""

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion for each request, in order.

        Raises:
            ValueError: a prompt and its longest reply do not fit into the model's context.
        """
        ...
