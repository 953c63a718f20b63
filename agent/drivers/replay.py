"""A driver that gives the replies of an earlier search again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.drivers.driver import Completion, DriverError, MayRetry, Place, Request
from agent.ledger import LlmLine, read_lines


class ReplayDriver:
    """Answers from a recorded `llm.jsonl`, by generation, slot, operator and attempt.

    Failed tries are given again too, so that a search spends what it spent. Prompts are not
    compared: the recording may stem from another version's words. Tokens, money and seconds are
    those of the recording.
    """

    def __init__(self, path: Path, given: Path | None = None) -> None:
        """Read the recording; tries that are on file in `given` already are not given again.

        Raises:
            ValueError: there is none, or a line of it cannot be read.
        """
        if not path.is_file():
            raise ValueError(f"driver.recording: {path}: no such file")
        self._path = path
        self._tries: dict[Place, list[LlmLine]] = {}
        self._cut_short: set[Place] = set()  # by a limit: not all that could be tried
        for line in read_lines(path):
            if line.is_skipped:
                self._cut_short.add(_place(line))
            else:
                self._tries.setdefault(_place(line), []).append(line)
        for line in read_lines(given) if given is not None else ():
            tries = self._tries.get(_place(line), [])
            if tries and _completion(0, tries[0]) == _completion(0, line):
                tries.pop(0)

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield the recorded tries at each request, in order.

        What has no further try failed for good, also where the recording ends amid its tries.

        Raises:
            DriverError: the recording has no reply for a request; the others were replied to.
        """
        missing: list[Place] = []
        for number, request in enumerate(requests):
            tries = self._tries.get(request.place, [])
            while tries:
                line = tries.pop(0)  # a request that comes again goes on with its next try
                yield _completion(number, line)
                goes_on = bool(tries) or request.place in self._cut_short
                if line.reply is not None or (goes_on and not may_retry(number)):
                    break
            else:
                if request.place not in self._tries or request.place in self._cut_short:
                    missing.append(request.place)
        if missing:
            where = f"generation {missing[0].generation}, slot {missing[0].slot}"
            raise DriverError(f"driver.recording: {self._path} has no reply for {where}")

    def close(self) -> None:
        """Do nothing."""


def _place(line: LlmLine) -> Place:
    return Place(line.generation, line.slot, line.operator, line.attempt)


def _completion(number: int, line: LlmLine) -> Completion:
    return Completion(
        request=number,
        text=line.reply,
        prompt_tokens=line.tokens,
        completion_tokens=0,
        seconds=line.seconds,
        model=line.model,
        cost=line.cost,
        estimated=line.estimated,
        failure=line.outcome.removeprefix("failed: ") if line.reply is None else "",
    )
