"""What the agent itself costs: graph, ledger and checkpoints of the demo's search, scores for free.

    python -m benchmarks.overhead RUN

RUN is a finished run. Its search is run again with its recorded replies, scores and slopes, so that
nothing but the agent's own work is timed, and compared with the wall time of RUN's search.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent import probes
from agent.candidate import Candidate
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
from selfpruner.searching import meeting_order
from selfpruner.workbench import budget_of, grid_of

REPEATS = 5

SlopeTable = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


def main() -> None:
    """Print the median of the repeats, their spread and the share of the run's search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = RunFolder.open(parser.parse_args().run)
    config = parse_config(folder.config.read_text(encoding="utf-8"), str(folder.config))
    whole = Results.load(folder.results).search.wall_seconds
    timings = [replayed(config, folder) for _ in range(REPEATS)]
    median = statistics.median(timings)
    spread = f"{min(timings):.2f} to {max(timings):.2f}"
    print(f"agent alone: median {median:.2f} s of {REPEATS} ({spread}); search: {whole:.1f} s")
    print(f"share: {100 * median / whole:.2f} %")


def replayed(config: RunConfig, folder: RunFolder) -> float:
    """Return the seconds of the search with recorded replies, scores and slopes.

    Raises:
        RuntimeError: the search differs from the recorded one.
    """
    recorded = Ledger(folder.path)
    with tempfile.TemporaryDirectory() as name:
        context = _context(config, folder, recorded, Path(name))
        started = time.perf_counter()
        run_search(context, Path(name) / "checkpoints.sqlite")
        seconds = time.perf_counter() - started
    found = context.ledger.candidates(), context.ledger.slopes()
    if _without_seconds(found[0]) != _without_seconds(recorded.candidates()):
        raise RuntimeError("the candidates differ from the recorded ones")
    if found[1] != recorded.slopes():
        raise RuntimeError("the slopes differ from the recorded ones")
    return seconds


def _without_seconds(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [replace(x, seconds=0.0) for x in candidates]


def _context(config: RunConfig, folder: RunFolder, recorded: Ledger, path: Path) -> SearchContext:
    """Return the search of the run with a recorded driver, recorded scores and slopes.

    Raises:
        ValueError: it began with a plan made of what is not on file.
    """
    if unknown := {"owl", "flap_global"} & {config.search.allocator, *config.search.starts}:
        raise ValueError(f"{folder}: what {', '.join(sorted(unknown))} asks of layers is not kept")
    architecture = architecture_of(config.model, trust_remote_code=config.trust_remote_code)
    grid, table = grid_of(config, architecture), stored_table(folder)
    if table is not None and config.weighs_latency:
        grid = table.worthwhile(grid)
    facts = {x.key: x for x in recorded.candidates()}
    slopes = iter(recorded.slopes())
    fitness: dict[tuple[str, int], float] = {}

    def score(plans: Sequence[Plan], sequences: Sequence[int]) -> NDArray[np.float64]:
        return np.array([[fitness[x.key, i] for i in sequences] for x in plans])

    def next_slopes(_: Plan, __: Sequence[int]) -> SlopeTable:
        return next(slopes).table

    def assess(plan: Plan) -> dict[str, float]:
        known = facts[plan.key]
        return {k: v for k in ("accuracy", "speedup") if (v := getattr(known, k)) is not None}

    asks = config.search.asks_llm
    context = SearchContext(
        settings=config.search,
        driver_settings=config.driver,
        seed=config.seed,
        grid=grid,
        budget=budget_of(config, architecture, grid, table),
        score=score,
        sequences=meeting_order(config.data.search.tokens // config.data.length, config.seed),
        sensitivity=folder.read_json("statistics/errors.json"),
        assess=assess,
        driver=ReplayDriver(folder.llm) if asks else None,
        strategy=load_strategy(config.search.strategy) if asks else None,
        ledger=Ledger(path),
        clock=time.monotonic,
        unit_latency=None if table is None else table.per_unit(grid),
        model_name=config.model,
        slopes=next_slopes if recorded.slopes() else None,
    )
    fitness |= _recorded_fitness(context, recorded)
    return context


def _recorded_fitness(context: SearchContext, recorded: Ledger) -> dict[tuple[str, int], float]:
    """Return what is on file of plans, by key and sequence, for the search in `context`."""
    plans = recorded.candidates()
    rows: list[tuple[str, Sequence[int], Iterable[float]]]
    rows = [(x.key, context.window(x.generation), x.values) for x in plans]
    rows += [(plans[x.candidate].key, x.sequences, x.values) for x in recorded.anchors()]
    for probe in recorded.probes():
        plan = context.grid.plan(probes.levels(context.space, probe.cut))
        rows.append((plan.key, context.window(0), probe.values))
    return {
        (key, i): float(value)
        for key, sequences, values in rows
        for i, value in zip(sequences, values, strict=False)
    }


if __name__ == "__main__":
    main()
