"""A small analytic search scene: no weights, the fitness is a weighted sum of squares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.drivers.driver import Completion, MayRetry, Request
from agent.ledger import Ledger
from agent.settings import DriverSettings, Price, RacingSettings, SearchSettings
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid, Plan

LAYERS = 6
NO_RACING = RacingSettings(bound=None)


@dataclass
class ScriptedDriver:
    """Answers with the scripted replies in turn, again from the start; keeps what it was asked."""

    replies: Sequence[str]
    requests: list[Request] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def complete(self, requests: Sequence[Request], _: MayRetry) -> Iterator[Completion]:
        self.batches.append(len(requests))
        for number, request in enumerate(requests):
            text = self.replies[len(self.requests) % len(self.replies)]
            self.requests.append(request)
            prompt = sum(len(m["content"]) for m in request.messages) // 4
            reply = min(len(text) // 3, request.max_tokens)
            yield Completion(number, text, prompt, reply, 0.5, "fake", cost=0.001)

    def close(self) -> None:
        pass


@dataclass
class Quadratic:
    """Fitness sum w (1 - kept share)^2 plus an offset per sequence; counts the plans it scores."""

    grid: Grid
    weights: NDArray[np.float64]
    plans: list[Plan] = field(default_factory=list)

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        self.plans += plans
        return np.array([[self.of(p) + 0.01 * s for s in sequences] for p in plans])

    def of(self, plan: Plan) -> float:
        return float((self.weights * (1 - self.kept(plan)) ** 2).sum())

    def kept(self, plan: Plan) -> NDArray[np.float64]:
        dense = self.grid.dense
        return np.array(
            [
                [x.kv_groups / dense.kv_groups, x.mlp_channels / dense.mlp_channels]
                for x in plan.layers
            ]
        )

    def slopes(self, plan: Plan, _: Sequence[int]) -> list[tuple[list[float], list[float]]]:
        """Return first-order changes as those of errors whose cuts stand at right angles.

        What a block loses beyond its cut is nothing yet; what it gets back was part of its error,
        and counts twice.
        """
        sizes = self.grid.attention, self.grid.mlp
        found = []
        for weights, shares in zip(self.weights, self.kept(plan), strict=True):
            attention, mlp = (
                [-2 * weight * max(0.0, (1 - at) ** 2 - (1 - x / size[-1]) ** 2) for x in size]
                for weight, at, size in zip(weights, shares, sizes, strict=True)
            )
            found.append((attention, mlp))
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Callable[..., SearchContext]:
    """Return a maker of contexts: `scene(allocator=..., replies=[...], ...)`, without racing."""
    count = itertools.count()

    def make(
        *,
        replies: Iterable[str] | None = None,
        seed: int = 0,
        folder: Path | None = None,
        sensitive: bool = True,
        max_tokens: int = 64,
        price: float = 0.0,
        when_down: Literal["stop", "classical"] = "stop",
        **settings: Any,
    ) -> SearchContext:
        architecture = Architecture("llama", LAYERS, 64, 8, 4, 8, 256, 100, True)
        grid = Grid.of(architecture, 16)
        weights = np.exp(np.random.default_rng(seed + 50).normal(size=(LAYERS, 2)))
        shares = np.array(grid.attention) / 4, np.array(grid.mlp) / 256
        known = weights if sensitive else np.ones_like(weights)
        chosen = SearchSettings(
            **{
                "allocator": "evolution",
                "evaluations": 40,
                "population": 8,
                "racing": NO_RACING,
                **settings,
            }
        )
        score = Quadratic(grid, weights)
        return SearchContext(
            settings=chosen,
            driver_settings=DriverSettings(
                max_tokens=max_tokens,
                price=Price(prompt=price, completion=price),
                when_down=when_down,
            ),
            seed=seed,
            grid=grid,
            budget=Budget.of(architecture, grid, "parameters", 0.7),
            score=score,
            slopes=score.slopes,
            sequences=range(4),
            sensitivity=[
                [(w * (1 - s) ** 2).tolist() for w, s in zip(row, shares, strict=True)]
                for row in known
            ],
            assess=lambda _: {"accuracy": 0.5, "speedup": 1.25},
            driver=None if replies is None else ScriptedDriver(list(replies)),
            strategy=load_strategy(chosen.strategy),
            ledger=Ledger(folder or tmp_path / f"run{next(count)}"),
            clock=itertools.count().__next__,
            model_name="makers/Tiny-1M",
        )

    return make
