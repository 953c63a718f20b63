"""What the agent itself costs: graph, ledger and checkpoints of the demo's search, scores for free.

    python -m benchmarks.overhead RUN

RUN is a finished run with an LLM. Its search is run again with its recorded replies and scores, so
that nothing but the agent's own work is timed, and compared with the wall time of RUN's search.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.drivers.replay import ReplayDriver
from agent.graph import run_search
from agent.ledger import Ledger
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.loading import architecture_of
from pruning.plan import Plan
from selfpruner.config import RunConfig, parse_config
from selfpruner.profiling import stored_table
from selfpruner.results import Results
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import budget_of, grid_of

REPEATS = 5


def main() -> None:
    """Print the median of the repeats, their spread and the share of the run's search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = RunFolder.open(parser.parse_args().run)
    config = parse_config(folder.config.read_text(encoding="utf-8"), str(folder.config))
    whole = Results.load(folder.results).search.wall_seconds
    timings = [_replayed(config, folder) for _ in range(REPEATS)]
    median = statistics.median(timings)
    spread = f"{min(timings):.2f} to {max(timings):.2f}"
    print(f"agent alone: median {median:.2f} s of {REPEATS} ({spread}); search: {whole:.1f} s")
    print(f"share: {100 * median / whole:.2f} %")


def _replayed(config: RunConfig, folder: RunFolder) -> float:
    """Return the seconds of the search with recorded replies and scores."""
    recorded = Ledger(folder.path)
    with tempfile.TemporaryDirectory() as name:
        context = _context(config, folder, recorded, Path(name))
        started = time.perf_counter()
        run_search(context, Path(name) / "checkpoints.sqlite")
        seconds = time.perf_counter() - started
    expected = [x.key for x in recorded.candidates()]
    if [x.key for x in context.ledger.candidates()] != expected:
        raise RuntimeError("the replayed search differs from the recorded one")
    return seconds


def _context(config: RunConfig, folder: RunFolder, recorded: Ledger, path: Path) -> SearchContext:
    """Return the search of the run with a recorded driver and recorded scores."""
    architecture = architecture_of(config.model, trust_remote_code=config.trust_remote_code)
    grid, table = grid_of(config, architecture), stored_table(folder)
    if table is not None and config.weighs_latency:
        grid = table.worthwhile(grid)
    budget = budget_of(config, architecture, grid, table)
    facts = {x.key: x for x in recorded.candidates()}

    def score(plans: Sequence[Plan], _: Sequence[int]) -> NDArray[np.float64]:
        return np.array([[facts[x.key].fitness] for x in plans])

    def assess(plan: Plan) -> dict[str, float]:
        known = facts[plan.key]
        return {k: v for k in ("accuracy", "speedup") if (v := getattr(known, k)) is not None}

    return SearchContext(
        settings=config.search,
        driver_settings=config.driver,
        seed=config.seed,
        grid=grid,
        budget=budget,
        score=score,
        sequences=[0],
        sensitivity=folder.read_json("statistics/errors.json"),
        assess=assess,
        driver=ReplayDriver(folder.llm),
        strategy=load_strategy(config.search.strategy),
        ledger=Ledger(path),
        clock=time.monotonic,
    )


if __name__ == "__main__":
    main()
