"""One plan, every correction, with and without the sequential refit: perplexity on held-out text.

    python -m benchmarks.backend [--data-root DIR]

Calibration 65,536 tokens, report 32,768 tokens at length 512, disjoint documents. Without a data
folder both are the packaged passages; with one, calibration is C4 and the report WikiText-2 test.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch

from agent import allocators
from benchmarks.cells import run_cells
from evaluators.perplexity import perplexity
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.plan import Plan
from pruning.refit import refit
from pruning.slicing import sliced
from selfpruner.config import RunConfig
from selfpruner.progress import Progress
from selfpruner.workbench import Workbench, prepare, quiet_libraries

SHARE = 0.7
METRIC = "wifv"
RIDGE = 0.1


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    root = parser.parse_args().data_root
    torch.manual_seed(0)
    quiet_libraries()
    texts = "passages" if root is None else "c4, wikitext2"
    cells = [
        {"texts": texts, "share": SHARE, "reconstruction": name, "refit": refitted}
        for name in ("none", "bias", "least_squares")
        for refitted in (False, True)
    ]
    bench = cache(lambda: _bench(root))
    ranked = cache(lambda name: _ranked(bench(), name))
    plan = cache(lambda: _plan(bench(), ranked("least_squares")))
    rows = run_cells("backend", cells, lambda cell: _figures(cell, bench(), ranked, plan))
    print("| reconstruction | refit | perplexity |\n|---|---|---|")
    for row in rows:
        cell, figures = row["cell"], row["figures"]
        print(f"| {cell['reconstruction']} | {cell['refit']} | {figures['perplexity']:.2f} |")
    print(f"dense {rows[0]['figures']['dense']:.2f}")


def _bench(root: str | None) -> Workbench:
    source = "passages" if root is None else "c4"
    report = "passages" if root is None else "wikitext2"
    config = RunConfig.model_validate(
        {
            "model": "smollm2-135m-instruct",
            "budget": {"parameters": SHARE},
            "data": {
                "root": root,
                "length": 512,
                "calibrate": {"source": source, "tokens": 65_536},
                "search": {"source": source, "tokens": 512},
                "select": {"source": source, "tokens": 512},
                "report": [{"source": report, "tokens": 32_768, "length": 512}],
            },
        }
    )
    return prepare(config, Progress())


def _ranked(bench: Workbench, reconstruction: str) -> ElasticModel:
    recipe = Recipe(METRIC, reconstruction, RIDGE)
    return ElasticModel.rank(
        bench.model, bench.family, bench.architecture, bench.texts.calibrate, recipe
    )


def _plan(bench: Workbench, elastic: ElasticModel) -> Plan:
    """Return the heuristic plan on the least-squares cut errors: the same for every row."""
    errors = [layer.cut_errors(bench.grid) for layer in elastic.layers]
    return bench.grid.plan(allocators.heuristic(bench.space, errors))


def _figures(cell: dict[str, Any], bench: Workbench, ranked: Any, plan: Any) -> dict[str, Any]:
    model = sliced(ranked(cell["reconstruction"]), plan())
    if cell["refit"]:
        refit(model, bench.model, bench.family, bench.texts.calibrate)
    (windows,) = bench.texts.report.values()
    found = perplexity(model, windows, batch_size=4)
    return {
        "perplexity": found.value,
        "stderr": found.stderr,
        "dense": perplexity(bench.model, windows, batch_size=4).value,
        "calibration_tokens": bench.texts.calibrate.numel(),
        "report_tokens": windows.numel(),
        "plan": plan().key,
    }


if __name__ == "__main__":
    main()
