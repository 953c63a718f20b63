"""Metric, ridge, amount of calibration and target of the refit: perplexity on held-out text.

    python -m benchmarks.ranking [--data-root DIR]

Report 32,768 tokens at length 512. Without a data folder all text is the packaged passages,
disjoint documents; with one, calibration is C4 and the report WikiText-2 test. Each row has the
heuristic plan on its own least-squares cut errors, some a uniform one. Not every combination: each
question has its rows, the others at what was best before.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent import allocators
from benchmarks.held_out import LENGTH, bench_of, paired, report_losses, texts_of
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.plan import Plan
from pruning.reconstruction.ridge import Ridge
from pruning.refit import refit
from pruning.slicing import sliced
from pruning.statistics import LayerStatistics, stream_statistics
from selfpruner.cells import Cell, Row, run_cells
from selfpruner.workbench import Workbench, settle_process

RESULTS = Path(__file__).parent / "results" / "ranking.jsonl"
FEW, USUAL, MANY = 16_384, 65_536, 131_072
SHARES = (0.7, 0.5)
BATCH = 8

# (calibration tokens, metric, ridge, share, refit); obs/wifv: obs for attention, wifv for channels
QUESTIONS: list[tuple[int, str, Ridge, float, str]] = [
    # Which metric?
    *(
        (USUAL, metric, 0.1, share, "none")
        for metric in ("wifv", "obs", "obs/wifv", "wanda_sp", "magnitude")
        for share in SHARES
    ),
    *((FEW, metric, 0.1, 0.7, "none") for metric in ("obs", "obs/wifv", "wanda_sp")),
    # Which ridge, on many tokens and on few?
    *((USUAL, metric, "auto", share, "none") for metric in ("wifv", "obs") for share in SHARES),
    *((FEW, "wifv", ridge, 0.7, "none") for ridge in (0.1, "auto")),
    # What is left of it after the refit, on which target, and on how many tokens?
    *(
        (USUAL, metric, 0.1, share, "stream")
        for metric in ("wifv", "obs", "obs/wifv")
        for share in SHARES
    ),
    (USUAL, "wifv", 0.1, 0.7, "block"),
    (FEW, "wifv", 0.1, 0.7, "stream"),
    (MANY, "wifv", 0.1, 0.7, "none"),
    (MANY, "wifv", 0.1, 0.7, "stream"),
]
# The same at 0.7, uncorrected by a refit, under plans that no cut error has chosen.
UNIFORM = {"uniform": allocators.uniform, "uniform_mlp": allocators.uniform_mlp}
UNIFORM_QUESTIONS = [
    (tokens, metric, plan)
    for tokens in (FEW, USUAL)
    for metric in ("wifv", "obs", "obs/wifv", "wanda_sp")
    for plan in UNIFORM
]


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    root = parser.parse_args().data_root
    torch.manual_seed(0)
    settle_process()
    names = ("tokens", "metric", "ridge", "share", "refit")
    cells: list[Cell] = [
        {"texts": texts_of(root), **dict(zip(names, row, strict=True))} for row in QUESTIONS
    ]
    cells += [
        dict(zip(names, (tokens, metric, 0.1, 0.7, "none"), strict=True))
        | {"texts": texts_of(root), "plan": plan}
        for tokens, metric, plan in UNIFORM_QUESTIONS
    ]
    bench = cache(lambda: bench_of(root, MANY))
    measured = lru_cache(1)(lambda tokens: _statistics(bench(), tokens))

    @lru_cache(1)
    def ranked(tokens: int, metric: str, ridge: Ridge) -> ElasticModel:
        return ElasticModel.of(
            bench().model,
            bench().family,
            bench().architecture,
            measured(tokens),
            _recipe(metric, ridge),
        )

    def figures(cell: Cell) -> dict[str, Any]:
        elastic = ranked(cell["tokens"], cell["metric"], cell["ridge"])
        return _figures(cell, bench(), elastic)

    # Cells of one ranking go together: statistics and rankings are kept one at a time.
    cells.sort(key=lambda cell: (cell["tokens"], cell["metric"], str(cell["ridge"])))
    print(_table(run_cells(RESULTS, cells, figures)))


def _recipe(metric: str, ridge: Ridge) -> Recipe:
    attention, _, channels = metric.rpartition("/")
    return Recipe(channels, "least_squares", ridge, attention_metric=attention or None)


def _table(rows: list[Row]) -> str:
    """Return perplexities, and log perplexities minus those of what was the default, paired."""
    lines = [
        "| kept | plan | refit | tokens | metric | ridge | perplexity | log, minus wifv, 0.1 |",
        "|---:|---|---|---:|---|---:|---:|---:|",
    ]
    before = {"tokens": USUAL, "metric": "wifv", "ridge": 0.1, "refit": "none"}

    def place(row: Row) -> tuple[float, str, str]:
        cell = row["cell"]
        return -cell["share"], cell.get("plan", ""), cell["refit"]

    for row in sorted(rows, key=place):
        cell, losses = row["cell"], row["figures"]["losses"]
        rival = next(x for x in rows if x["cell"] == {**cell, **before})
        lines.append(
            f"| {cell['share']} | {cell.get('plan', 'heuristic')} | {cell['refit']} | "
            f"{cell['tokens']} | {cell['metric']} | {cell['ridge']} | "
            f"{row['figures']['perplexity']:.2f} | {paired(losses, rival['figures']['losses'])} |"
        )
    return "\n".join(lines)


def _calibration(bench: Workbench, tokens: int) -> Tensor:
    """Return the first windows of the calibration text, `tokens` tokens in all."""
    windows: Tensor = bench.texts.calibrate[: tokens // LENGTH]
    return windows


def _statistics(bench: Workbench, tokens: int) -> list[LayerStatistics]:
    """Return the statistics of all layers: one dense pass for every ranking on these tokens."""
    text = _calibration(bench, tokens)
    return list(stream_statistics(bench.model, bench.family, text, BATCH, hold_out=True))


def _plan(bench: Workbench, elastic: ElasticModel, cell: Cell) -> Plan:
    """Return the cell's plan; the heuristic one is on the model's own least-squares cut errors."""
    space = bench.within(bench.budget.at(cell["share"])).space
    if "plan" in cell:
        return bench.grid.plan(UNIFORM[cell["plan"]](space))
    errors = [layer.cut_errors(bench.grid) for layer in elastic.layers]
    return bench.grid.plan(allocators.heuristic(space, errors))


def _figures(cell: Cell, bench: Workbench, elastic: ElasticModel) -> dict[str, Any]:
    plan = _plan(bench, elastic, cell)
    model = sliced(elastic, plan)
    if cell["refit"] != "none":
        refit(
            [model],
            bench.model,
            bench.family,
            [elastic.orders(plan)],
            _calibration(bench, cell["tokens"]),
            target=cell["refit"],
            batch_size=BATCH,
        )
    losses = report_losses(bench, model)
    return {
        "perplexity": math.exp(statistics.fmean(losses)),
        "losses": [round(x, 6) for x in losses],
        "ridges": [list(layer.ridges) for layer in elastic.layers],
        "plan": plan.to_json(),
    }


if __name__ == "__main__":
    main()
