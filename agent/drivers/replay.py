"""A driver that gives the replies of an earlier search again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.drivers.driver import Completion, DriverError, MayRetry, Place, Request
from agent.ledger import LlmLine, read_lines


class ReplayDriver:
    """Answers from a recorded `llm.jsonl`, by generation, slot, operator and attempt.

    Prompts are not compared: the recording may stem from another version's words. Tokens, money
    and seconds are those of the recording.
    """

    def __init__(self, path: Path) -> None:
        """Read the recording.

        Raises:
            ValueError: there is none, or a line of it cannot be read.
        """
        if not path.is_file():
            raise ValueError(f"driver.recording: {path}: no such file")
        self._path = path
        self._replies = {_place(x): x for x in read_lines(path) if x.reply is not None}

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield the recorded reply of each request, in order.

        Raises:
            DriverError: the recording has none for a request.
        """
        del may_retry
        for number, request in enumerate(requests):
            line = self._replies.get(request.place)
            if line is None:
                where = f"generation {request.place.generation}, slot {request.place.slot}"
                raise DriverError(f"driver.recording: {self._path} has no reply for {where}")
            yield Completion(
                request=number,
                text=line.reply,
                prompt_tokens=line.tokens,
                completion_tokens=0,
                seconds=line.seconds,
                model=line.model,
                cost=line.cost,
                estimated=line.estimated,
            )

    def close(self) -> None:
        """Do nothing."""


def _place(line: LlmLine) -> Place:
    return Place(line.generation, line.slot, line.operator, line.attempt)
