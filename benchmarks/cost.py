"""What a scored candidate costs, against the plain way: slices, trie and racing, side by side.

    python -m benchmarks.cost [--data-root DIR] [--generations 200] [--timed 20]

A (1 + lambda) search by level switches on 8,192 search tokens is recorded with every candidate
scored on all of them; ways to race are then replayed on the record (how often each keeps the same
survivor, what it loses otherwise, what it spares). Some generations are timed in five ways in turn:
plain (one full forward of the dense-shaped model a candidate), slices (each candidate alone), trie
(all candidates together), raced (together, and dropped when clearly worse), raced closely (dropped
when hardly worse). The model is ranked with bare settings (WIFV, no curvature), in float32 on the
CPU. Without a data folder the text is the packaged passages, with one C4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent import allocators, population
from agent.projection import Levels
from agent.racing import Floats, mean, race
from agent.racing_replay import replay
from agent.settings import RacingSettings
from pruning.elastic import ElasticModel, Prunable
from pruning.plan import Plan
from selfpruner.cells import Cell, Row, run_cells
from selfpruner.config import RunConfig
from selfpruner.environment import device_name
from selfpruner.fitness import Fitness
from selfpruner.progress import Progress
from selfpruner.workbench import Workbench, prepare, rank, settle_process

RESULTS = Path(__file__).parent / "results" / "cost.jsonl"
SHARE = 0.7
OFFSPRING = 4
_ROUNDING = 1e-5  # nats, of one machine with other micro-batches
WAYS = ("plain", "slices", "trie", "raced", "raced closely")

# Ways to race: sequences of 32 seen after each round, and bounds. The first of each is what
# `search.racing` has where no recipe says otherwise.
FINE = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
STEPS = {
    "3, 5, 8, 12, 18, 32": (3, 5, 8, 12, 18, 32),
    "4, 8, 16, 32": (4, 8, 16, 32),
    "2, 4, 8, 16, 32": (2, 4, 8, 16, 32),
    "fine from 3": FINE,
    "fine from 4": FINE[1:],
}
BOUNDS = (1.5, 3.0, 2.0, 1.0, 0.7, 0.5)
# The closest of them that loses at most 1 % of KL in 95 % of the generations.
CLOSELY = RacingSettings(rounds=tuple(x / FINE[-1] for x in FINE), bound=0.7)


def main() -> None:
    """Run the cells that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--timed", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    settle_process()
    scene = cache(lambda: Scene(bench_of(options.data_root)))
    texts = "passages" if options.data_root is None else "c4"
    rows: list[Row] = []
    for number in range(options.generations):
        cell = {"texts": texts, "part": "record", "generation": number}
        parent = rows[-1]["figures"] if rows else None
        rows += run_cells(RESULTS, [cell], lambda c, p=parent: _recorded(scene(), c, p))  # type: ignore[misc]
    every = max(2, options.generations // max(2, options.timed))  # the first has no survivor before
    cells = [
        {"texts": texts, "part": "time", "generation": n, "threads": torch.get_num_threads()}
        for n in range(every - 1, options.generations, every)
    ]
    timed = run_cells(RESULTS, cells, lambda c: _timed(scene(), rows, c))
    print(f"{_timings(timed)}\n\n{_races(rows)}")


class Scene:
    """The ranked model and its fitness."""

    def __init__(self, bench: Workbench) -> None:
        prunable, self.errors = rank(bench, Progress())
        assert isinstance(prunable, ElasticModel)
        self.bench, self.elastic = bench, prunable
        self.fitness = self.judge(prunable)
        # The dense references are made once, before anything is timed.
        self.fitness([Plan.dense(bench.architecture)], range(self.fitness.num_sequences))

    def judge(self, runs: Prunable) -> Fitness:
        """Return the fitness of whatever runs plans."""
        tokens, batch = self.bench.texts.search, self.bench.config.evaluation.batch_size
        return Fitness(
            runs, self.bench.model, self.bench.family, {"kl": 1.0}, tokens, batch_size=batch
        )

    def fresh(self, parent: Plan) -> Fitness:
        """Return a fitness that has the corrections of `parent` at hand and no others."""
        elastic = ElasticModel(self.bench.model, self.bench.family, self.elastic.layers)
        elastic.parameters(parent)
        return self.fitness.of(elastic)


def bench_of(root: str | None) -> Workbench:
    """Return the demo model with 8,192 search tokens of the passages, or of C4 in a folder."""
    source = "passages" if root is None else "c4"
    config = RunConfig.model_validate(
        {
            "model": "smollm2-135m-instruct",
            "budget": {"parameters": SHARE},
            "dtype": "float32",
            "device": "cpu",
            "data": {
                "root": root,
                "calibrate": {"source": source, "tokens": 16_384},
                "search": {"source": source, "tokens": 8_192},
                "select": {"source": source, "tokens": 256},
                "report": [{"source": "passages", "tokens": 256}],
            },
        }
    )
    return prepare(config, Progress())


def _recorded(scene: Scene, cell: Cell, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return a generation: its plans, all their values, and the survivor."""
    bench = scene.bench
    if before is None:
        parent = allocators.heuristic(bench.space, scene.errors)
        plans, kept = [bench.grid.plan(parent)], None
    else:
        kept = {"plan": before["survivor"], "values": before["survivor_values"]}
        _check_machine(scene, before)
        parent = bench.grid.levels(Plan.from_json(before["survivor"]))
        plans = _offspring(bench, parent, cell["generation"])
    table = scene.fitness(plans, range(scene.fitness.num_sequences)).round(6)
    field = [{"plan": p.to_json(), "values": v.tolist()} for p, v in zip(plans, table, strict=True)]
    field += [kept] if kept is not None else []
    best = min(field, key=lambda x: mean(np.array(x["values"])))
    return {
        "plans": [p.to_json() for p in plans],
        "values": table.tolist(),
        "survivor": best["plan"],
        "survivor_values": best["values"],
    }


def _check_machine(scene: Scene, before: dict[str, Any]) -> None:
    """Refuse to go on with a record whose values are of another machine or ranking.

    Raises:
        ValueError: one line.
    """
    found = scene.fitness([Plan.from_json(before["survivor"])], range(1)).item()
    known = before["survivor_values"][0]
    if abs(found - known) > _ROUNDING:
        raise ValueError(
            f"{RESULTS}: the record is of another machine: its last survivor has {known} on the "
            f"first sequence, here {found:.6f}"
        )


def _offspring(bench: Workbench, parent: Levels, generation: int) -> list[Plan]:
    """Return distinct neighbours of the parent."""
    made = {bench.grid.plan(parent): None}
    for number in range(100):
        rng = population.generator(0, generation, number)
        made.setdefault(bench.grid.plan(population.mutate(parent, bench.space, rng)))
        if len(made) > OFFSPRING:
            break
    return list(made)[1:]


def _timed(scene: Scene, rows: Sequence[Row], cell: Cell) -> dict[str, Any]:
    """Return the seconds of a candidate of this generation, each way; raced with the survivor."""
    number = cell["generation"]
    figures, before = rows[number]["figures"], rows[number - 1]["figures"]
    plans = [Plan.from_json(x) for x in figures["plans"]]
    parent = Plan.from_json(before["survivor"])
    sequences = range(scene.fitness.num_sequences)
    (rival,) = scene.fitness([parent], sequences)  # the record may be of another machine
    dense = Plan.dense(scene.bench.architecture)
    scored: dict[str, float] = {}

    def plain(_: Fitness) -> int:
        scene.fitness([dense], sequences)
        return 1

    def slices(judge: Fitness) -> int:
        for plan in plans:
            judge([plan], sequences)
        return len(plans)

    def trie(judge: Fitness) -> int:
        judge(plans, sequences)
        return len(plans)

    def raced(name: str, settings: RacingSettings, judge: Fitness) -> int:
        def columns(chosen: Sequence[int], span: range) -> Floats:
            return judge([plans[i] for i in chosen], span)

        found = race(columns, [np.array([])] * len(plans), len(sequences), settings, rival)
        scored[name] = sum(map(len, found)) / (len(plans) * len(sequences))
        return len(plans)

    races = {"raced": RacingSettings(), "raced closely": CLOSELY}
    ways: dict[str, Callable[[Fitness], int]] = {"plain": plain, "slices": slices, "trie": trie}
    ways |= {name: partial(raced, name, settings) for name, settings in races.items()}
    seconds = {}
    # Another order each time, so that none of them always follows the same one.
    for name in np.random.default_rng(number).permutation(WAYS).tolist():
        judge = scene.fresh(parent)
        start = time.perf_counter()
        count = ways[name](judge)
        seconds[name] = (time.perf_counter() - start) / count
    return {"seconds": seconds, "scored": scored, "machine": device_name(torch.device("cpu"))}


def _races(rows: Sequence[Row]) -> str:
    """Return what each way to race would have kept, lost and scored."""
    tables = [np.array(x["figures"]["values"]) for x in rows]
    least = [mean(np.array(x["figures"]["survivor_values"])) for x in rows]
    lines = [
        f"{len(rows)} generations of {OFFSPRING}, raced",
        "",
        "| rounds | bound | same survivor | within 1 % of KL | most lost | mean lost | scored |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seen in STEPS.items():
        for bound in BOUNDS:
            settings = RacingSettings(rounds=tuple(x / seen[-1] for x in seen), bound=bound)
            found = replay(tables, settings)
            losses = [100 * x / y for x, y in zip(found.losses, least, strict=True)]
            close = statistics.fmean(x <= 1 for x in losses)
            lines.append(
                f"| {name} | {bound:g} | {100 * found.agreement:.1f} % | {100 * close:.1f} % | "
                f"{max(losses):.2f} % | {statistics.fmean(losses):.3f} % | "
                f"{100 * found.share:.1f} % |"
            )
    return "\n".join(lines)


def _timings(timed: Sequence[Row]) -> str:
    """Return the seconds of a candidate each way, and the share of the plain way's mean."""
    seconds = {way: [x["figures"]["seconds"][way] for x in timed] for way in WAYS}
    lines = [
        "| way | seconds a candidate, median | quartiles | mean | share of plain |",
        "|---|---:|---:|---:|---:|",
    ]
    plain = statistics.fmean(seconds["plain"])
    for way in WAYS:
        low, middle, high = statistics.quantiles(seconds[way], n=4)
        average = statistics.fmean(seconds[way])
        lines.append(
            f"| {way} | {middle:.2f} | {low:.2f} to {high:.2f} | {average:.2f} | "
            f"1/{plain / average:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
