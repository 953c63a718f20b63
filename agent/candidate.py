"""A scored plan and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Literal, NotRequired, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from pruning.plan import Plan

Origin = Literal["llm", "llm_repaired", "fallback", "classical", "heuristic"]


class Scores(TypedDict):
    """What is known of a plan's fitness; lower is better.

    Attributes:
        fitness: mean over all search sequences; an estimate where the plan dropped out of a race.
        stderr: standard error of that.
        sequences: how many it has seen, always the first ones.
        of: how many there are; without it, the plan has seen all.
        values: fitness on each sequence seen; without them nothing can be paired with it.
    """

    fitness: float
    stderr: float
    sequences: int
    of: NotRequired[int]
    values: NotRequired[list[float]]


@dataclass(frozen=True)
class Candidate:
    """One line of `candidates.jsonl`.

    Attributes:
        id: number of the candidate in this run, from 0 in the order of scoring.
        generation: 0 for the first one.
        slot: its place among the proposals of its generation, that of its calls of the LLM.
        operator: generate, crossover, mutate, or the name of an allocator without a search.
        origin: who made it in the end.
        parents: ids.
        genotype: `[[kv_groups, q_per_group, mlp_channels], ...]`, one row a layer.
        key: `Plan.key` of the genotype.
        scores: fitness and what it rests on.
        accuracy: 0 to 1 on held-out items; only the best of a generation has one.
        speedup: against the dense model, above 0; only the best of a generation has one.
        tokens: LLM tokens, prompts included, spent on this proposal.
        seconds: time of scoring.
    """

    id: int
    generation: int
    slot: int
    operator: str
    origin: Origin
    parents: tuple[int, ...]
    genotype: tuple[tuple[int, int, int], ...]
    key: str
    scores: Scores
    accuracy: float | None
    speedup: float | None
    tokens: int
    seconds: float

    @property
    def fitness(self) -> float:
        """Mean score over the search sequences, or an estimate of it; lower is better."""
        return self.scores["fitness"]

    @property
    def is_complete(self) -> bool:
        """Whether the plan has seen all search sequences."""
        return self.charge == 1

    @property
    def charge(self) -> Fraction:
        """Share of a full evaluation that scoring took."""
        seen = self.scores["sequences"]
        return Fraction(seen, self.scores.get("of", seen))

    @property
    def values(self) -> NDArray[np.float64]:
        """Fitness on each of the first sequences, as far as the plan has seen them."""
        return np.array(self.scores.get("values", []), dtype=np.float64)

    @property
    def plan(self) -> Plan:
        """The plan of the genotype."""
        return Plan.from_json(self.genotype)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, the inverse of `from_json`."""
        data = asdict(self)
        data["parents"] = list(self.parents)
        data["genotype"] = [list(row) for row in self.genotype]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Return the candidate that `to_json` wrote.

        Raises:
            ValueError: fields are missing or unknown, the origin is unknown, or the key does not
                belong to the genotype.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            odd = ", ".join(sorted(set(data) ^ names))
            raise ValueError(f"candidates.jsonl: missing or unknown fields: {odd}")
        if data["origin"] not in get_args(Origin):
            raise ValueError(
                f"candidates.jsonl: origin {data['origin']!r}, "
                f"allowed {', '.join(get_args(Origin))}"
            )
        plan = Plan.from_json(data["genotype"])
        if plan.key != data["key"]:
            raise ValueError(
                f"candidates.jsonl: candidate {data['id']} has key {data['key']!r}, "
                f"its genotype has {plan.key}"
            )
        rows = tuple((a, b, c) for a, b, c in data["genotype"])
        return cls(**{**data, "parents": tuple(data["parents"]), "genotype": rows})
