"""What happened in a run: append-only files of JSON lines, the truth about a search."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from agent.candidate import Candidate

ORDER = ("select", "generate", "crossover", "mutate")  # within a generation


@dataclass(frozen=True)
class Charge:
    """What calls of an LLM cost: how many, their tokens and their money."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Charge) -> Charge:
        """Return both together."""
        return Charge(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)


@dataclass(frozen=True)
class LlmLine:
    """One line of `llm.jsonl`: one call of one attempt of one slot, or a call that was not made.

    `attempt` is 0, or 1 for the repair; `call` counts the tries at it; `tokens` counts prompt and
    reply, a guess where `estimated`; `reply` is None where a call failed or was not made.
    `outcome` starts with accepted, invalid, failed or skipped.
    """

    generation: int
    slot: int
    operator: str
    attempt: int
    call: int
    prompt_hash: str
    messages: tuple[dict[str, str], ...]
    reply: str | None
    tokens: int
    estimated: bool
    cost: float
    seconds: float
    model: str
    outcome: str

    @property
    def charge(self) -> Charge:
        """What this line is charged: nothing where no call was made."""
        return Charge(int(not self.is_skipped), self.tokens, self.cost)

    @property
    def is_skipped(self) -> bool:
        """Whether a limit kept the call from being made."""
        return self.outcome.startswith("skipped")


@dataclass(frozen=True)
class Probe:
    """One line of `probes.jsonl`: the dense model with one block cut, or the dense model itself.

    Attributes:
        layer, block, level: of the block that is cut, block 0 attention and 1 MLP; all None for
            the dense model.
        of: search sequences that there are.
        values: fitness on the first of them, lower is better.
    """

    layer: int | None
    block: int | None
    level: int | None
    of: int
    values: tuple[float, ...]

    @property
    def cut(self) -> tuple[int | None, int | None, int | None]:
        """Layer, block and level."""
        return self.layer, self.block, self.level

    @property
    def charge(self) -> Fraction:
        """Share of a full evaluation that scoring took."""
        return Fraction(len(self.values), self.of)


@dataclass(frozen=True)
class Anchor:
    """One line of `anchors.jsonl`: the plan that a generation is compared with, on its sequences.

    Attributes:
        generation: whose plans are compared with it.
        candidate: id of that plan: 0, the first one, but for an elitist search.
        sequences: of the generation's window.
        values: fitness on each of them, lower is better.
        scored: how many were not known from an earlier window.
    """

    generation: int
    candidate: int
    sequences: tuple[int, ...]
    values: tuple[float, ...]
    scored: int

    @property
    def charge(self) -> Fraction:
        """Share of a full evaluation that scoring took; the first is charged as a candidate."""
        return Fraction(self.scored, len(self.values)) if self.generation else Fraction()


@dataclass(frozen=True)
class SlopeLine:
    """One line of `slopes.jsonl`: what other levels would add to a plan's fitness, to first order.

    Attributes:
        generation: after which they were measured, -1 before the first.
        genotype: of the plan, `(kv groups, query heads a group, MLP channels)` by layer.
        charge: full evaluations that measuring counts as.
        table: `[layer][block][level]`, block 0 attention and 1 MLP, 0 at the plan's own levels.
    """

    generation: int
    genotype: tuple[tuple[int, int, int], ...]
    charge: Fraction
    table: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; the charge as a pair of whole numbers."""
        return {**asdict(self), "charge": self.charge.as_integer_ratio()}


class Ledger:
    """The lines of `candidates`, `llm`, `probes`, `anchors` and `slopes.jsonl` in one run folder.

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
        self._probe_path = folder / "probes.jsonl"
        self._anchor_path = folder / "anchors.jsonl"
        self._slopes_path = folder / "slopes.jsonl"
        self._candidates = [
            _candidate(x, f"{self._candidate_path.name}, line {n}")
            for n, x in enumerate(_read(self._candidate_path, mend=True), 1)
        ]
        self._lines = read_lines(self._llm_path, mend=True)
        self._probes = [
            _probe(x, f"{self._probe_path.name}, line {n}")
            for n, x in enumerate(_read(self._probe_path, mend=True), 1)
        ]
        self._anchors = [
            _anchor(x, f"{self._anchor_path.name}, line {n}")
            for n, x in enumerate(_read(self._anchor_path, mend=True), 1)
        ]
        self._slopes = [
            _slopes(x, f"{self._slopes_path.name}, line {n}")
            for n, x in enumerate(_read(self._slopes_path, mend=True), 1)
        ]
        self._by_key = {x.key: x for x in self._candidates}
        self._attempts: dict[tuple[int, int, int, str], list[LlmLine]] = {}
        for line in self._lines:
            self._file(line)

    def candidates(self) -> list[Candidate]:
        """Return all candidates in the order of scoring."""
        return list(self._candidates)

    def lines(self) -> list[LlmLine]:
        """Return all attempts in the order of writing."""
        return list(self._lines)

    def probes(self) -> list[Probe]:
        """Return all probes in the order of scoring."""
        return list(self._probes)

    def anchors(self) -> list[Anchor]:
        """Return the scores of what each generation is compared with, in their order."""
        return list(self._anchors)

    def slopes(self) -> list[SlopeLine]:
        """Return all slopes in the order of measuring."""
        return list(self._slopes)

    def find(self, key: str) -> Candidate | None:
        """Return the candidate whose plan has this key, if it was scored."""
        return self._by_key.get(key)

    def best(
        self, count: int, before: int | None = None, *, complete: bool = False
    ) -> list[Candidate]:
        """Return the `count` fittest candidates, of generations before `before` if given.

        Of equal fitness, those that have seen all sequences come first; `complete` asks for
        no others.
        """
        pool = [x for x in self._candidates if before is None or x.generation < before]
        pool = [x for x in pool if x.is_complete or not complete]
        return sorted(pool, key=lambda x: (x.fitness, not x.is_complete, x.id))[:count]

    def equivalents(self, before: int | None = None) -> Fraction:
        """Return the full evaluations that scoring came to, before a generation if given.

        Probes come before all generations.
        """
        pool: list[Candidate | Anchor | SlopeLine]
        pool = [*self._candidates, *self._anchors, *self._slopes]
        charges = [x.charge for x in pool if before is None or x.generation < before]
        return sum(charges, sum((x.charge for x in self._probes), Fraction()))

    def price(self, generation: int) -> Fraction:
        """Return the full evaluations that the plans up to a generation took.

        Slopes that were measured after it are for plans of the next.
        """
        later = (x.charge for x in self._slopes if x.generation == generation)
        return self.equivalents(before=generation + 1) - sum(later, Fraction())

    def charged(self, generation: int | None = None, operator: str = "") -> Charge:
        """Return what all calls cost, or those before this operator of this generation."""
        lines: Iterable[LlmLine] = self._lines
        if generation is not None:
            here = (generation, ORDER.index(operator))
            lines = (x for x in lines if (x.generation, ORDER.index(x.operator)) < here)
        return sum((x.charge for x in lines), Charge())

    def attempts(
        self, generation: int, slot: int, attempt: int, prompt_hash: str
    ) -> Sequence[LlmLine]:
        """Return the calls of an attempt that are on file, so that none is paid twice."""
        return self._attempts.get((generation, slot, attempt, prompt_hash), ())

    def add_candidate(self, candidate: Candidate) -> None:
        """Append one scored candidate."""
        _append(self._candidate_path, candidate.to_json())
        self._candidates.append(candidate)
        self._by_key[candidate.key] = candidate

    def add_line(self, line: LlmLine) -> None:
        """Append one attempt."""
        _append(self._llm_path, {**asdict(line), "messages": list(line.messages)})
        self._lines.append(line)
        self._file(line)

    def add_probe(self, probe: Probe) -> None:
        """Append one probe."""
        _append(self._probe_path, {**asdict(probe), "values": list(probe.values)})
        self._probes.append(probe)

    def add_anchor(self, anchor: Anchor) -> None:
        """Append the scores of what one generation is compared with."""
        _append(self._anchor_path, asdict(anchor))
        self._anchors.append(anchor)

    def add_slopes(self, slopes: SlopeLine) -> None:
        """Append the slopes of one plan."""
        _append(self._slopes_path, slopes.to_json())
        self._slopes.append(slopes)

    def _file(self, line: LlmLine) -> None:
        place = (line.generation, line.slot, line.attempt, line.prompt_hash)
        self._attempts.setdefault(place, []).append(line)


def read_lines(path: Path, *, mend: bool = False) -> list[LlmLine]:
    """Return the lines of an `llm.jsonl` without a torn last one; `mend` cuts it from the file.

    Raises:
        ValueError: another line cannot be read.
    """
    return [_line(x, f"{path.name}, line {n}") for n, x in enumerate(_read(path, mend), 1)]


def _candidate(data: Any, where: str) -> Candidate:
    try:
        return Candidate.from_json(data)
    except (KeyError, TypeError):
        raise ValueError(f"{where}: not a candidate as this version writes it") from None


def _line(data: Any, where: str) -> LlmLine:
    names = {field.name for field in fields(LlmLine)}
    if not isinstance(data, dict) or set(data) != names or data["operator"] not in ORDER:
        raise ValueError(f"{where}: not a call of an LLM as this version writes it")
    return LlmLine(**{**data, "messages": tuple(data["messages"])})


def _probe(data: Any, where: str) -> Probe:
    names = {field.name for field in fields(Probe)}
    if not isinstance(data, dict) or set(data) != names or not data["values"]:
        raise ValueError(f"{where}: not a probe as this version writes it")
    return Probe(**{**data, "values": tuple(data["values"])})


def _anchor(data: Any, where: str) -> Anchor:
    names = {field.name for field in fields(Anchor)}
    if not isinstance(data, dict) or set(data) != names or not data["values"]:
        raise ValueError(f"{where}: not an anchor as this version writes it")
    lists = {name: tuple(data[name]) for name in ("sequences", "values")}
    return Anchor(**{**data, **lists})


def _slopes(data: Any, where: str) -> SlopeLine:
    names = {field.name for field in fields(SlopeLine)}
    if not isinstance(data, dict) or set(data) != names or not data["table"]:
        raise ValueError(f"{where}: not slopes as this version writes them")
    genotype = tuple((a, b, c) for a, b, c in data["genotype"])
    table = tuple((tuple(a), tuple(m)) for a, m in data["table"])
    return SlopeLine(data["generation"], genotype, Fraction(*data["charge"]), table)


def _append(path: Path, data: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def _read(path: Path, mend: bool) -> Sequence[dict[str, Any]]:
    """Return the whole lines of `path`; `mend` cuts a last line without its end from the file."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) < len(raw):
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
