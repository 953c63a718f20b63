"""What a search may spend and what it has spent; the ledger counts, a clock comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.ledger import Ledger
from agent.settings import SearchSettings


@dataclass(frozen=True)
class Spending:
    """Limits of a search against its ledger.

    Attributes:
        settings: limits on evaluations, tokens and seconds.
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
        earlier = sum(x.seconds for x in ledger.candidates()) + sum(
            x.seconds for x in ledger.lines()
        )
        return cls(settings, ledger, clock, clock(), earlier)

    @property
    def seconds(self) -> float:
        """Seconds spent, those of earlier processes as far as the ledger knows them."""
        return self.earlier + self.clock() - self.started

    @property
    def evaluations(self) -> int:
        """Distinct plans scored."""
        return len(self.ledger.candidates())

    @property
    def llm_calls(self) -> int:
        """Replies paid for."""
        return sum(1 for x in self.ledger.lines() if x.reply is not None)

    @property
    def llm_tokens(self) -> int:
        """Prompt and reply tokens paid for."""
        return sum(x.tokens for x in self.ledger.lines())

    def evaluations_left(self, generation: int, pending: int) -> int:
        """Return how many more plans this generation may propose when `pending` wait for scores."""
        done = sum(1 for x in self.ledger.candidates() if x.generation < generation)
        return max(0, self.settings.evaluations - done - pending)

    def reached(self) -> str | None:
        """Return which limit ends the search, or None."""
        limits = self.settings
        if self.evaluations >= limits.evaluations:
            return "evaluations"
        if limits.seconds is not None and self.seconds >= limits.seconds:
            return "seconds"
        return None
