"""What a search may spend and what it has spent; the ledger counts, a clock comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from agent.ledger import Charge, Ledger
from agent.settings import SearchSettings

_LAST = 2  # evaluations of a last generation: its one plan, and the first plan beside it


@dataclass
class Spending:
    """Limits of a search against its ledger.

    Attributes:
        settings: limits on evaluations, calls, tokens, money and seconds.
        ledger: what was spent, also by an earlier process of the same run.
        clock: seconds that only grow.
        started: the clock when this process began.
        earlier: seconds spent by earlier processes.
    """

    settings: SearchSettings
    ledger: Ledger
    clock: Callable[[], float]
    started: float
    earlier: float = 0.0

    @classmethod
    def begin(
        cls, settings: SearchSettings, ledger: Ledger, clock: Callable[[], float]
    ) -> Spending:
        """Return the spending from now on; what the ledger holds was spent earlier."""
        return cls(settings, ledger, clock, clock())

    @property
    def seconds(self) -> float:
        """Seconds spent, those of earlier processes included."""
        return self.earlier + self.clock() - self.started

    @property
    def is_late(self) -> bool:
        """Whether the limit on seconds is reached."""
        return self.settings.seconds is not None and self.seconds >= self.settings.seconds

    @property
    def evaluations(self) -> int:
        """Distinct plans scored."""
        return len(self.ledger.candidates())

    @property
    def equivalents(self) -> Fraction:
        """Full evaluations charged: a plan counts for the share of the sequences it has seen."""
        return self.ledger.equivalents()

    def evaluations_left(self, generation: int, pending: int) -> int:
        """Return how many more plans this generation may propose when `pending` wait for scores.

        A full evaluation is set aside for each of them, so that the limit is never passed. Where
        generations have windows the first plan takes one, and two are kept for a last generation:
        of one plan, made of all that the others have taught. Where three are left the last
        generation has two plans, where four are left the last two have one each.
        """
        left = int(self.settings.evaluations - self.ledger.equivalents(before=generation))
        if self.settings.window is not None:
            left -= int(generation > 0)
            left = left - _LAST if left > _LAST else left
        return max(0, left - pending)

    def is_last(self, generation: int) -> bool:
        """Return whether this generation is the one plan that windows end a search with."""
        return self.settings.window is not None and self.evaluations_left(generation, 0) <= 1

    def reached(self) -> str | None:
        """Return which limit ends the search, or None."""
        if self.settings.evaluations - self.equivalents < (_LAST if self.settings.window else 1):
            return "evaluations"
        for line in self.ledger.lines():
            if line.is_skipped:
                return line.outcome.rpartition(".")[2]
        return "seconds" if self.is_late else None

    def purse(self, generation: int, operator: str) -> Purse:
        """Return what this operator of this generation may spend on calls."""
        return Purse(self.settings, self.ledger.charged(generation, operator))


class Purse:
    """Calls, tokens and money: what is spent, and the worst case of what is under way.

    Both together never pass a limit, so a call that was let go can always be paid.
    """

    def __init__(self, limits: SearchSettings, spent: Charge) -> None:
        """Begin with what was spent before."""
        self._limits, self._spent = limits, spent
        self._reserved: dict[int, Charge] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return not self._reserved

    def reserve(self, key: int, worst: Charge) -> str | None:
        """Set aside the worst case of call `key`, or return the limit that it might pass."""
        total = sum(self._reserved.values(), self._spent) + worst
        for name in ("calls", "tokens", "cost"):
            limit = getattr(self._limits, name)
            if limit is not None and getattr(total, name) > limit:
                return name
        self._reserved[key] = worst
        return None

    def settle(self, key: int, charge: Charge) -> None:
        """Put what call `key` did cost in the place of its worst case."""
        self._reserved.pop(key, None)
        self._spent += charge
