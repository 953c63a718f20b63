"""One plan, every correction, with and without the sequential refit: perplexity on held-out text.

    python -m benchmarks.backend [--data-root DIR]

Calibration 65,536 tokens, report 32,768 tokens at length 512, disjoint documents. Without a data
folder both are the packaged passages; with one, calibration is C4 and the report WikiText-2 test.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch

from agent import allocators
from benchmarks.held_out import SHARE, bench_of, paired, report_losses, texts_of
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.plan import Plan
from pruning.refit import refit
from pruning.slicing import sliced
from selfpruner.cells import Cell, Row, run_cells
from selfpruner.workbench import Workbench, settle_process

RESULTS = Path(__file__).parent / "results" / "backend.jsonl"
TOKENS = 65_536
METRIC = "wifv"
RIDGE = 0.1


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    root = parser.parse_args().data_root
    torch.manual_seed(0)
    settle_process()
    cells = [
        {"texts": texts_of(root), "share": SHARE, "reconstruction": name, "refit": refitted}
        for name in ("none", "bias", "least_squares")
        for refitted in (False, True)
    ]
    bench = cache(lambda: bench_of(root, TOKENS))
    ranked = cache(lambda name: _ranked(bench(), name))
    plan = cache(lambda: _plan(bench(), ranked("least_squares")))
    dense = cache(lambda: report_losses(bench(), bench().model))

    def figures(cell: Cell) -> dict[str, Any]:
        return _figures(cell, bench(), ranked(cell["reconstruction"]), plan()) | {
            "dense": math.exp(statistics.fmean(dense()))
        }

    rows = run_cells(RESULTS, cells, figures)
    print(_table(rows))


def _table(rows: list[Row]) -> str:
    """Return perplexities, and log perplexities minus those of `bias`, paired by window."""
    lines = [
        "| reconstruction | refit | perplexity | log perplexity minus bias, paired |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        cell, losses = row["cell"], row["figures"]["losses"]
        rival = {**cell, "reconstruction": "bias"}
        others = next(x["figures"]["losses"] for x in rows if x["cell"] == rival)
        lines.append(
            f"| {cell['reconstruction']} | {cell['refit']} | "
            f"{row['figures']['perplexity']:.2f} | {paired(losses, others)} |"
        )
    return "\n".join([*lines, f"dense {rows[0]['figures']['dense']:.2f}"])


def _ranked(bench: Workbench, reconstruction: str) -> ElasticModel:
    recipe = Recipe(METRIC, reconstruction, RIDGE)
    return ElasticModel.rank(
        bench.model, bench.family, bench.architecture, bench.texts.calibrate, recipe
    )


def _plan(bench: Workbench, elastic: ElasticModel) -> Plan:
    """Return the heuristic plan on the least-squares cut errors: the same for every row."""
    errors = [layer.cut_errors(bench.grid) for layer in elastic.layers]
    return bench.grid.plan(allocators.heuristic(bench.space, errors))


def _figures(cell: Cell, bench: Workbench, elastic: ElasticModel, plan: Plan) -> dict[str, Any]:
    model = sliced(elastic, plan)
    if cell["refit"]:
        orders = elastic.orders(plan)
        refit([model], bench.model, bench.family, [orders], bench.texts.calibrate)
    losses = report_losses(bench, model)
    return {
        "perplexity": math.exp(statistics.fmean(losses)),
        "losses": [round(x, 6) for x in losses],
        "calibration_tokens": bench.texts.calibrate.numel(),
        "report_tokens": sum(x.numel() for x in bench.texts.report.values()),
        "plan": plan.key,
    }


if __name__ == "__main__":
    main()
