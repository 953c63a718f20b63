"""Whole recipes at equal budgets: perplexity on held-out text of what each of them leaves.

    python -m benchmarks.recipes [--data-root DIR] [--model NAME] [--shares 0.7] [--rows best flap]
                                 [--scale 0.25] [--streamed]

The default recipe beside the published ones and beside uniform plans under its own correction and
refit: calibration 32,768 tokens, searches at the price of 40 evaluations on 4,096 tokens (80 of
the default on windows of 2,048), report 32,768 tokens at length 512. Without a data folder all
text is the packaged passages, disjoint documents; with one it is C4, and for the report the
WikiText-2 test text. For models too large for that: `--scale` is the share of evaluations and of
tokens, but for those of the Fisher matrices and of self_pruner's search; `--streamed` keeps one
layer in memory, for the rows that neither rank sequentially nor are driven by the pruned model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from agent.settings import DriverSettings, SearchSettings
from benchmarks.held_out import report_losses
from evaluators.significance import mean_interval
from selfpruner.arena import Arena
from selfpruner.cells import Cell, Row, run_cells
from selfpruner.config import BudgetSettings, RunConfig, load_config
from selfpruner.environment import device_name
from selfpruner.experiment import digest_of
from selfpruner.finishing import best_on_fresh_tokens, finish
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.workbench import prepare, settle_process

BASE = Path(__file__).with_suffix(".yaml")
RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
SHARES = (0.7, 0.5)
DEFAULT = "best"
UNIFORM = ("uniform_mlp, our correction", "uniform, our correction")
WANDA = ("wanda_sp, frozen", "wanda_sp, sequential")

# Settings of each row over the common ones; rows of one ranking stand together.
ROWS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {"search.evaluations": 80},  # on windows of 2,048 tokens
    UNIFORM[0]: {"search.allocator": "uniform_mlp"},
    UNIFORM[1]: {"search.allocator": "uniform"},
    "flap": {"recipe": "flap"},
    "self_pruner": {
        "recipe": "self_pruner",
        "search.evaluations": 40,
        "data.search.tokens": 4096,
    },
    WANDA[0]: {"recipe": "wanda_sp", "pruning.statistics": "frozen"},
    WANDA[1]: {"recipe": "wanda_sp"},
}

_NOWHERE = {"root": None}
STREAMED = {"memory": "streamed", "data.choices": 0}
STREAMABLE = (DEFAULT, *UNIFORM, "flap", WANDA[0])

# What the default may have of the perplexity of the best of these rows.
TARGETS = {("flap",): 0.5, UNIFORM: 0.75, ("self_pruner",): 0.5, WANDA: 1.0}


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--shares", type=float, nargs="+", choices=SHARES, default=SHARES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="the default too; by default all")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--streamed", action="store_true")
    options = parser.parse_args()
    settle_process(streaming=options.streamed)
    configs = _configs(options)
    cells = [
        {
            "texts": "passages" if options.data_root is None else "c4, wikitext2",
            "model": config.model,
            "row": row,
            "share": share,
            "settings": _digest(config),
        }
        for (row, share), config in configs.items()
    ]
    progress = Progress()
    with Arenas(progress) as arenas:

        def figures(cell: Cell) -> dict[str, Any]:
            progress.note(f"cell: {cell['row']}, {cell['share']}")
            config = configs[cell["row"], cell["share"]]
            arena, dense = arenas.of(_shared(config))
            return _figures(arena.proposing(config), dense, progress)

        print(_table(run_cells(RESULTS, cells, figures)))


class Arenas:
    """One ranked model at a time, with what the dense one loses on the report text."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._folder = progress, ExitStack()
        self._open: dict[str, tuple[Arena, list[float]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def of(self, text: str) -> tuple[Arena, list[float]]:
        """Return those of a configuration in JSON; another one is closed before."""
        if text not in self._open:
            self._close()
            # What is streamed goes there.
            path = Path(self._folder.enter_context(TemporaryDirectory()))
            config = RunConfig.model_validate_json(text)
            folder = RunFolder.create(path, config)
            arena = Arena.open(prepare(config, self._progress, folder), folder, self._progress)
            self._open[text] = arena, report_losses(arena.bench, arena.bench.model)
        return self._open[text]

    def _close(self) -> None:
        self._open.clear()
        self._folder.close()


def _digest(config: RunConfig) -> str:
    """Return what a cell's figures depend on beside what it names, wherever the data lies."""
    return digest_of(config.model_copy(update={"data": config.data.model_copy(update=_NOWHERE)}))


def _configs(options: argparse.Namespace) -> dict[tuple[str, float], RunConfig]:
    """Return the configuration of every row and share that is asked for."""
    make = partial(_config, model=options.model, root=options.data_root)
    own, possible = (STREAMED, STREAMABLE) if options.streamed else ({}, ROWS)
    return {
        (row, share): _scaled(make, {**ROWS[row], **own, "budget.parameters": share}, options.scale)
        for row in dict.fromkeys((DEFAULT, *(options.rows or possible)))
        for share in options.shares
    }


def _config(
    settings: Mapping[str, Any], *, model: str | None = None, root: str | None = None
) -> RunConfig:
    own = dict(settings)
    if root is not None:
        roles = ("calibrate", "search", "select")
        own |= {"data.root": root} | {f"data.{role}.source": "c4" for role in roles}
        own = {"data.report": [{"source": "wikitext2", "tokens": 32_768, "length": 512}], **own}
    lines = [f"{name}={json.dumps(value)}" for name, value in own.items()]
    return load_config(BASE, model=model, settings=lines)


def _scaled(
    make: Callable[[Mapping[str, Any]], RunConfig], settings: Mapping[str, Any], scale: float
) -> RunConfig:
    """Return the configuration with a share of its tokens and evaluations."""
    full = make(settings)
    if scale == 1:
        return full
    data = full.data
    roles = ["calibrate", "select"]
    # In a search without windows an evaluation is all search tokens.
    if full.search.window is not None or not full.search.searches:
        roles.append("search")
    less = {f"data.{role}.tokens": round(scale * int(getattr(data, role).tokens)) for role in roles}
    report = [x.model_dump() | {"tokens": round(scale * int(x.tokens or 0))} for x in data.report]
    count = round(scale * full.search.evaluations)
    return make({**settings, **less, "data.report": report, "search.evaluations": count})


def _shared(config: RunConfig) -> str:
    """Return what rows have in common that rank and judge alike, as JSON."""
    same = {
        "budget": BudgetSettings(parameters=SHARES[0]),
        "search": SearchSettings(allocator="uniform"),  # of no LLM, which a streamed model forbids
        "driver": DriverSettings(),
    }
    return config.model_copy(update=same).model_dump_json()


def _figures(arena: Arena, dense: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Return what the recipe leaves of the model, judged on the report text."""
    bench = arena.bench
    with TemporaryDirectory() as name:
        folder = RunFolder.create(Path(name), bench.config)
        found = search(arena, bench.config, folder, progress)
    plan = best_on_fresh_tokens(found, arena.selection)[0].plan
    finished = finish(bench, arena.prunable, {DEFAULT: plan}, arena.selection, progress)
    model, refit = finished[DEFAULT]
    losses = report_losses(bench, model)
    return {
        "perplexity": math.exp(statistics.fmean(losses)),
        "dense": math.exp(statistics.fmean(dense)),
        "achieved": bench.achieved(plan),
        "parameters": sum(x.numel() for x in model.parameters()),
        "evaluations": found.equivalents,
        "refit_kept": refit is not None and refit.kept,
        "search_seconds": round(found.seconds, 1),
        "machine": device_name(bench.family.head(bench.model).device),
        "losses": [round(x, 6) for x in losses],
        "plan": plan.to_json(),
    }


def _table(rows: list[Row]) -> str:
    """Return the perplexities by row and budget, and the default's beside its targets."""
    found = {(x["cell"]["row"], x["cell"]["share"]): x["figures"] for x in rows}
    names, shares = (list(dict.fromkeys(x)) for x in zip(*found, strict=True))

    def perplexity(name: str, share: float) -> float:
        return float(found[name, share]["perplexity"])

    lines = [
        "| recipe | " + " | ".join(f"{share} kept" for share in shares) + " |",
        "|---|" + "---:|" * len(shares),
        *(
            f"| {row} | " + " | ".join(f"{perplexity(row, share):.2f}" for share in shares) + " |"
            for row in names
        ),
        f"dense {rows[0]['figures']['dense']:.2f}",
    ]
    if len(machines := {x["figures"]["machine"] for x in rows}) > 1:
        lines.append("rows are of different machines: " + ", ".join(sorted(machines)))
    for share in shares:
        for rivals, most in TARGETS.items():
            asked = [name for name in rivals if name in names]
            if asked:
                rival = min(asked, key=lambda name: perplexity(name, share))
                told = _beside(found[DEFAULT, share], found[rival, share], most)
                lines.append(f"{share}: {told} of {rival}")
    return "\n".join(lines)


def _beside(ours: Mapping[str, Any], theirs: Mapping[str, Any], most: float) -> str:
    """Return the ratio of perplexities, its 95 % interval over windows, and the target."""
    gaps = [a - b for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    low, high = mean_interval(gaps) or (math.nan, math.nan)
    ratio = math.exp(statistics.fmean(gaps))
    verdict = "reached" if ratio <= most else "missed"
    return f"{ratio:.3f} ({math.exp(low):.3f} to {math.exp(high):.3f}; target {most}: {verdict})"


if __name__ == "__main__":
    main()
