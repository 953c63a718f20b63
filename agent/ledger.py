"""What happened in a run: two append-only files of JSON lines, the truth about a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.candidate import Candidate

ORDER = ("generate", "select", "crossover", "mutate")


@dataclass(frozen=True)
class LlmLine:
    """One line of `llm.jsonl`: one attempt of one slot.

    `attempt` is 0, or 1 for the repair; `tokens` counts prompt and reply; `reply` is None where
    no call was made. `outcome` starts with accepted, invalid, duplicate or skipped.
    """

    generation: int
    slot: int
    operator: str
    attempt: int
    prompt_hash: str
    messages: tuple[dict[str, str], ...]
    reply: str | None
    tokens: int
    seconds: float
    outcome: str


class Ledger:
    """The lines of `candidates.jsonl` and `llm.jsonl` in one run folder.

    Each line is flushed as it is written. A torn last line (a run that was killed while it wrote)
    is cut when the ledger is opened; a broken line elsewhere is an error.
    """

    def __init__(self, folder: Path) -> None:
        """Open or start the ledger in `folder`.

        Raises:
            ValueError: a line other than a torn last one cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._candidate_path = folder / "candidates.jsonl"
        self._llm_path = folder / "llm.jsonl"
        self._candidates = [Candidate.from_json(x) for x in _read(self._candidate_path)]
        self._lines = [_line(x) for x in _read(self._llm_path)]
        self._by_key = {x.key: x for x in self._candidates}

    def candidates(self) -> list[Candidate]:
        """Return all candidates in the order of scoring."""
        return list(self._candidates)

    def lines(self) -> list[LlmLine]:
        """Return all attempts in the order of writing."""
        return list(self._lines)

    def find(self, key: str) -> Candidate | None:
        """Return the candidate whose plan has this key, if it was scored."""
        return self._by_key.get(key)

    def best(self, count: int, before: int | None = None) -> list[Candidate]:
        """Return the `count` fittest candidates, of generations before `before` if given."""
        pool = [x for x in self._candidates if before is None or x.generation < before]
        return sorted(pool, key=lambda x: (x.fitness, x.id))[:count]

    def tokens_before(self, generation: int, operator: str) -> int:
        """Return the LLM tokens spent before this operator of this generation began."""
        here = (generation, ORDER.index(operator))
        return sum(x.tokens for x in self._lines if (x.generation, ORDER.index(x.operator)) < here)

    def reply(self, generation: int, slot: int, attempt: int, prompt_hash: str) -> LlmLine | None:
        """Return the line of an attempt made before a crash, so that it is not paid twice."""
        wanted = (generation, slot, attempt, prompt_hash)
        for line in self._lines:
            if (line.generation, line.slot, line.attempt, line.prompt_hash) == wanted:
                return line
        return None

    def add_candidate(self, candidate: Candidate) -> None:
        """Append one scored candidate."""
        _append(self._candidate_path, candidate.to_json())
        self._candidates.append(candidate)
        self._by_key[candidate.key] = candidate

    def add_line(self, line: LlmLine) -> None:
        """Append one attempt."""
        _append(self._llm_path, {**asdict(line), "messages": list(line.messages)})
        self._lines.append(line)


def _line(data: dict[str, Any]) -> LlmLine:
    return LlmLine(**{**data, "messages": tuple(data["messages"])})


def _append(path: Path, data: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def _read(path: Path) -> Sequence[dict[str, Any]]:
    """Return the lines of `path`; a last line without its end is cut from the file."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON ({error})") from None
        rows.append(row)
    return rows
