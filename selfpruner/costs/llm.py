"""What the LLM of a search will be asked, by `agent.estimate`, before any model is there."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from agent.descent import PRICE
from agent.estimate import estimate
from agent.ledger import Ledger
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.budget import Budget
from pruning.plan import Grid, Plan
from selfpruner.config import RunConfig


@dataclass(frozen=True)
class Asking:
    """Calls of the LLM and their tokens, and the generations that they are spread over.

    Attributes:
        calls, prompt_tokens, reply_tokens: of all calls together.
        cost: money at `driver.price`.
        generations: after the first, at least 0.
    """

    calls: int
    prompt_tokens: int
    reply_tokens: int
    cost: float
    generations: int

    @property
    def tokens(self) -> int:
        """Prompts and replies together."""
        return self.prompt_tokens + self.reply_tokens


def asking(config: RunConfig, grid: Grid, budget: Budget, layers: int) -> Asking:
    """Return what the search of `config` will ask, from its first prompt.

    The prompt tells of the uniform plan and of cut errors of a made-up model (the squared share
    removed): its length hardly depends on either.

    Raises:
        ValueError: the strategy is none; one line.
    """
    generations = num_generations(config)
    if not config.search.asks_llm:
        return Asking(0, 0, 0, 0.0, generations)
    with tempfile.TemporaryDirectory() as folder:
        guess = estimate(_context(config, grid, budget, layers, Path(folder)))
    reply = guess.calls * (config.driver.max_tokens // 2)
    return Asking(guess.calls, guess.tokens - reply, reply, guess.cost, generations)


def num_generations(config: RunConfig, evaluations: int | None = None) -> int:
    """Return the generations after the first, no plan dropping out of a race.

    `evaluations` takes the place of the search's own.
    """
    search, slopes = config.search, slopes_charge(config)
    if not search.searches:
        return 0
    spent = search.evaluations if evaluations is None else evaluations
    later = spent - search.population - slopes
    beside = int(search.window is not None) + slopes
    return max(0, math.ceil(later / (search.crossover + search.mutate + beside)))


def slopes_charge(config: RunConfig) -> float:
    """Return the full evaluations that the slopes of a generation are charged as, 0 without."""
    search, sequences = config.search, config.data.search.tokens // config.data.length
    each = min(search.window or sequences, sequences)
    return PRICE * min(search.slopes, sequences) / each if config.measures_slopes else 0.0


def _context(
    config: RunConfig, grid: Grid, budget: Budget, layers: int, folder: Path
) -> SearchContext:
    errors = tuple(_errors(kept) for kept in (grid.attention, grid.mlp))
    return SearchContext(
        settings=config.search.model_copy(update={"seed_plan": False}),
        driver_settings=config.driver,
        seed=config.seed,
        grid=grid,
        budget=budget,
        score=_no_score,
        slopes=_no_slopes if config.measures_slopes else None,
        sequences=range(config.data.search.tokens // config.data.length),
        sensitivity=[errors] * layers,
        assess=None,
        driver=None,
        strategy=load_strategy(config.search.strategy),
        ledger=Ledger(folder),
        clock=lambda: 0.0,
        unit_latency=(1.0, 1.0),
        model_name=config.model,
    )


def _errors(kept: Sequence[int]) -> list[float]:
    return [(1 - x / kept[-1]) ** 2 for x in kept]


def _no_score(plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
    raise AssertionError(f"an estimate scores nothing: {len(plans)} plans, {len(sequences)} rows")


def _no_slopes(plan: Plan, sequences: Sequence[int]) -> NoReturn:
    raise AssertionError(f"an estimate goes nowhere: {plan.key}, {len(sequences)} rows")
