"""A search in a folder that may be killed at any moment.

`python -m tests.agent.soak_search FOLDER EVALUATIONS` prints `ready` when the search goes on and
`done` at its end. SIGTERM makes it drain, which ends in status 3. A question that is on file
already, or a plan that is scored twice, ends it in status 1.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from langgraph.runtime import RunControl
from numpy.typing import NDArray

from agent.drivers.driver import Completion, MayRetry, Request
from agent.graph import SearchDrainedError, run_search
from agent.ledger import Ledger
from agent.settings import DriverSettings, SearchSettings
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid, Plan
from tests.agent.conftest import LAYERS, NO_RACING, Quadratic
from tests.agent.drivers.chat_server import fitting

DRAINED = 3


def reply(request: Request) -> str:
    """Return what depends on the request's place alone; one of six is to be repaired."""
    rng = random.Random(repr(request.place))
    data = fitting(request.schema, rng)
    return "Let me think." if rng.random() < 1 / 6 else json.dumps(data)


@dataclass
class PlaceDriver:
    """Answers a batch in an order of its own, and takes its time."""

    ledger: Ledger
    seconds: float

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        del may_retry
        answered = {
            (x.generation, x.slot, x.operator, x.attempt)
            for x in self.ledger.lines()
            if x.reply is not None
        }
        for number in random.sample(range(len(requests)), len(requests)):
            request, place = requests[number], requests[number].place
            key = (place.generation, place.slot, place.operator, place.attempt)
            assert key not in answered, f"asked again: {place}"
            time.sleep(self.seconds * random.random())
            text = reply(request)
            prompt = sum(len(m["content"]) for m in request.messages) // 4
            yield Completion(number, text, prompt, len(text) // 3, 0.1, "place", cost=0.001)

    def close(self) -> None:
        pass


@dataclass
class SlowScore:
    """Scores a plan at most once in the life of the folder, and takes its time."""

    inner: Quadratic
    ledger: Ledger
    seconds: float

    def __call__(self, plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        for plan in plans:
            assert self.ledger.find(plan.key) is None, f"scored again: {plan.key}"
            time.sleep(self.seconds * random.random())
        return self.inner(plans, sequences)


def assess(seconds: float) -> dict[str, float]:
    time.sleep(seconds * random.random())
    return {"accuracy": 0.5, "speedup": 1.25}


def context_in(
    folder: Path, *, seconds: float = 0.0, evaluations: int = 60, **settings: Any
) -> SearchContext:
    """Return the search of `folder`; each call of a judge or driver takes up to `seconds`."""
    architecture = Architecture("llama", LAYERS, 64, 8, 4, 8, 256, 100, True)
    grid = Grid.of(architecture, 16)
    weights = np.exp(np.random.default_rng(50).normal(size=(LAYERS, 2)))
    shares = np.array(grid.attention) / 4, np.array(grid.mlp) / 256
    ledger = Ledger(folder)
    return SearchContext(
        settings=SearchSettings(
            allocator="llm",
            evaluations=evaluations,
            **{"population": 8, "racing": NO_RACING, **settings},
        ),
        driver_settings=DriverSettings(max_tokens=64),
        seed=0,
        grid=grid,
        budget=Budget.of(architecture, grid, "parameters", 0.7),
        score=SlowScore(Quadratic(grid, weights), ledger, seconds),
        sequences=range(4),
        sensitivity=[
            [(w * (1 - s) ** 2).tolist() for w, s in zip(row, shares, strict=True)]
            for row in weights
        ],
        assess=lambda _: assess(seconds),
        driver=PlaceDriver(ledger, seconds),
        strategy=load_strategy("moves"),
        ledger=ledger,
        clock=time.monotonic,
    )


def main(folder: Path, evaluations: int) -> int:
    control = RunControl()
    signal.signal(signal.SIGTERM, lambda *_: control.request_drain())
    context = context_in(folder, seconds=0.03, evaluations=evaluations)
    print("ready", flush=True)
    try:
        run_search(context, folder / "checkpoints.sqlite", control=control)
    except SearchDrainedError:
        return DRAINED
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
