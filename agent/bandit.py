"""Who makes a proposal, the LLM or the classical operator: a fixed share, or one that is learned.

A learned share is a bandit of two arms (Thompson sampling with discounted Beta posteriors,
Raj and Kalyani, arXiv 1707.09727). All it knows is the candidates of earlier generations and a
seed, so a resumed search decides as the first one did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.candidate import Candidate
from agent.population import generator

Arm = Literal["llm", "classical"]

FLOOR = 0.1
"""Least probability of either arm: both go on being tried."""

_DISCOUNT = 0.9  # what a proposal counts less with every generation that passed
_TIE = 0.01  # success rates as near as this are equal, and the fewer tokens decide
_STREAM = 6_011  # keeps these draws apart from those of the operators
_ROUNDING = 1e-9
_ORDER: tuple[Arm, Arm] = ("llm", "classical")
_ARM_OF: dict[str, Arm] = {
    "llm": "llm",
    "llm_repaired": "llm",
    "fallback": "llm",
    "classical": "classical",
}


@dataclass(frozen=True)
class Belief:
    """What is believed of an arm: its success rate is Beta(1 + successes, 1 + failures).

    Attributes:
        successes, failures: discounted numbers of proposals that improved on all before, or not.
        tokens: of the LLM per proposal, a plain mean; 0 before the first one.
    """

    successes: float = 0.0
    failures: float = 0.0
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        """Expected success rate, 0 to 1."""
        return (1 + self.successes) / (2 + self.successes + self.failures)


def takes_turn(number: int, share: float) -> bool:
    """Return whether the LLM makes proposal `number` of a search, counted from 0.

    `share`, 0 to 1, is spread evenly over the numbers.
    """
    classical = 1 - share
    return int((number + 1) * classical + _ROUNDING) == int(number * classical + _ROUNDING)


def draws_llm(candidates: Sequence[Candidate], seed: int, generation: int, slot: int) -> bool:
    """Return whether the learned share gives a slot to the LLM; every slot has a draw of its own.

    Args:
        candidates: of the ledger; only those of generations before `generation` count.
        seed: of the search.
        generation: of the proposal.
        slot: its number in its generation, all operators counted.
    """
    return _drawn(beliefs(candidates, generation), seed, generation, slot) == "llm"


def beliefs(candidates: Sequence[Candidate], generation: int) -> dict[Arm, Belief]:
    """Return what the generations before `generation` say of both arms.

    A fallback counts for the LLM, which was asked. Proposals of the first generation have nothing
    to improve on and do not count.
    """
    past = {x.id: x for x in candidates if x.generation < generation}
    best = _best_before(past)
    made: dict[Arm, list[tuple[float, bool, int]]] = {arm: [] for arm in _ORDER}
    for candidate in past.values():
        arm = _ARM_OF.get(candidate.origin)
        if arm is not None and candidate.generation in best:
            weight = _DISCOUNT ** (generation - 1 - candidate.generation)
            improved = improves(candidate, best[candidate.generation])
            made[arm].append((weight, improved, candidate.tokens))
    return {arm: _belief(rows) for arm, rows in made.items()}


def improves(candidate: Candidate, best: float) -> bool:
    """Return whether a proposal is better than `best`, the lowest fitness before its generation.

    Ranks rather than differences, so that neither the scale of the fitness nor its flattening
    late in a search matters. A fallback does not: the LLM brought no plan. Parents are no measure:
    the LLM may choose weak ones, a step downhill has the best plan.
    """
    return candidate.origin != "fallback" and candidate.fitness < best


def _best_before(past: Mapping[int, Candidate]) -> dict[int, float]:
    """Return the lowest fitness before each generation that has an earlier one."""
    lowest: dict[int, float] = {}
    for x in past.values():
        lowest[x.generation] = min(x.fitness, lowest.get(x.generation, x.fitness))
    numbers = sorted(lowest)
    return {n: min(lowest[m] for m in numbers[:i]) for i, n in enumerate(numbers) if i}


def _belief(rows: Sequence[tuple[float, bool, int]]) -> Belief:
    """Return the belief after proposals of `(weight, whether it improved, tokens)`."""
    return Belief(
        successes=sum(weight * improved for weight, improved, _ in rows),
        failures=sum(weight * (not improved) for weight, improved, _ in rows),
        tokens=sum(tokens for _, _, tokens in rows) / max(len(rows), 1),
    )


def _drawn(known: Mapping[Arm, Belief], seed: int, generation: int, slot: int) -> Arm:
    """Return the arm of the larger draw from the posteriors; now and then either arm."""
    rng = generator(seed, generation, slot, _STREAM)
    chance = rng.random()
    if chance < 2 * FLOOR:
        return "llm" if chance < FLOOR else "classical"
    beta = [rng.beta(1 + known[arm].successes, 1 + known[arm].failures) for arm in _ORDER]
    if abs(beta[0] - beta[1]) <= _TIE:
        return min(_ORDER, key=lambda arm: known[arm].tokens)
    return _ORDER[0] if beta[0] > beta[1] else _ORDER[1]
