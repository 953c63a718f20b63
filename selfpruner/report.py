"""The report of a run, and several runs side by side: self-contained HTML files.

Everything from the run is text to the templates and is escaped there; nothing but the run folder
is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from selfpruner import notation
from selfpruner.results import NORMALISED, Results, SpeedRow, TaskNumbers
from selfpruner.run_folder import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path) -> Path:
    """Write `report.html` of the run in `folder` and return its path.

    Raises:
        ValueError: `results.json` is missing or departs from the schema.
    """
    results = Results.load(folder / "results.json")
    page = page_environment().get_template("report.html.j2")
    text = page.render(
        results=results,
        run=folder.resolve().name,
        charts=_charts(results),
        phases=_phases(results.speed.rows),
        origins=_origins(results),
        perplexities=_perplexities(results),
        tasks=_tasks(results),
        resolution=results.quality.resolution,
        kept=_kept(results),
        longest=max([*results.cost.stage_seconds.values(), 1e-9]),
        is_stock=_is_stock(folder, results),
        environment=_flat(results.environment),
        config=_text(folder / "config.yaml"),
    )
    return write_page(folder / "report.html", text)


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that shows several runs side by side to `out` and return its path.

    Raises:
        ValueError: no folder is given, or the results of one cannot be read.
    """
    from selfpruner.charts import comparison_chart

    if not folders:
        raise ValueError("report: got no run folders, want at least one")
    runs = [
        (_letter(index), folder.resolve().name, Results.load(folder / "results.json"))
        for index, folder in enumerate(folders)
    ]
    points = [
        (letter, x.model.parameters_dense, dense, x.model.parameters_pruned, pruned)
        for letter, _, x in runs
        if (dense := x.quality.dense.mean) is not None
        and (pruned := x.quality.pruned.mean) is not None
    ]
    text = page_environment().get_template("comparison.html.j2").render(
        runs=runs,
        chart=comparison_chart(points),
        texts=_union(x.quality.pruned.perplexity for _, _, x in runs),
        phases={letter: _phases(x.speed.rows) for letter, _, x in runs},
        phase_names=_union(_phases(x.speed.rows) for _, _, x in runs),
    )  # fmt: skip
    return write_page(out, text)


def page_environment() -> Environment:
    """Return what renders the templates of all pages; all text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(notation.FILTERS)
    return environment


def write_page(path: Path, text: str) -> Path:
    """Write a page, the same bytes on every system, and return its path."""
    return write_whole(path, text)


def _charts(results: Results) -> dict[str, Any]:
    from selfpruner import charts

    dense, pruned = results.quality.dense, results.quality.pruned
    figures = {
        task: (dense.figure(task), pruned.figure(task))
        for task in dense.tasks
        if task in pruned.tasks
    }
    points = [
        (text, model, kind, value)
        for text, rows in _perplexities(results)
        for model, kind, value, _ in rows
        if value is not None
    ]
    return {
        "units": charts.units_chart(results),
        "fitness": charts.fitness_chart(results.history),
        "front": charts.front_chart(results.front),
        "accuracy": charts.accuracy_chart(dense, pruned, figures),
        "perplexity": charts.perplexity_chart(points),
        "speed": charts.speed_chart(results.speed.rows),
    }


def _phases(rows: Sequence[SpeedRow]) -> dict[str, SpeedRow]:
    """Return the first row of each phase: the headline."""
    first: dict[str, SpeedRow] = {}
    for row in rows:
        first.setdefault(row.phase, row)
    return first


def _origins(results: Results) -> list[dict[str, Any]]:
    """Return, by origin: proposals scored, times they set a new best, and their best fitness."""
    from selfpruner.charts import ORIGINS

    table: dict[str, dict[str, Any]] = {}
    lowest = float("inf")
    for row in results.history:
        name = ORIGINS[row.origin][0]
        mine = table.setdefault(name, {"name": name, "count": 0, "records": 0, "best": None})
        mine["count"] += 1
        if row.fitness is None:
            continue
        if row.fitness < lowest:
            lowest = row.fitness
            mine["records"] += 1
        mine["best"] = row.fitness if mine["best"] is None else min(mine["best"], row.fitness)
    order = [name for name, _ in ORIGINS.values()]
    return sorted(table.values(), key=lambda x: order.index(x["name"]))


_Row = tuple[str, str, float | None, int]


def _perplexities(results: Results) -> list[tuple[str, list[_Row]]]:
    """Return by text the rows (model, kind, perplexity, parameters): dense first, then pruned."""
    quality, model = results.quality, results.model
    models = [
        ("dense", "dense", quality.dense.perplexity, model.parameters_dense),
        ("pruned", "pruned", quality.pruned.perplexity, model.parameters_pruned),
        *((k, "control", v.perplexity, v.parameters) for k, v in results.controls.items()),
    ]
    return [
        (text, [(name, kind, values[text], size) for name, kind, values, size in models
                if text in values])
        for text in quality.dense.perplexity
    ]  # fmt: skip


def _tasks(results: Results) -> list[dict[str, Any]]:
    """Return by task the cells acc, acc_norm and stderr, each `dense → pruned` in percent."""
    table = []
    difference = results.quality.difference
    p_values = (difference.mcnemar if difference is not None else None) or {}
    for name, after in results.quality.pruned.tasks.items():
        before = results.quality.dense.tasks.get(name)
        is_normalised = name in NORMALISED and after.acc_norm is not None
        table.append({
            "name": name,
            "n": after.n,
            "split": after.split,
            "p": p_values.get(name),
            "cells": [
                {"text": _change(before, after, field), "counts": counts}
                for field, counts in (
                    ("acc", not is_normalised), ("acc_norm", is_normalised), ("stderr", False)
                )
            ],
        })  # fmt: skip
    return table


def _change(before: TaskNumbers | None, after: TaskNumbers, field: str) -> str:
    old = None if before is None else getattr(before, field)
    new = getattr(after, field)
    if old is None and new is None:
        return notation.MISSING
    texts = [notation.MISSING if x is None else notation.number(100 * x) for x in (old, new)]
    return " → ".join(texts)


def _kept(results: Results) -> dict[str, float]:
    """Return the shares (0 to 1) of query heads and of MLP channels kept over all layers."""
    dense, layers = results.units_dense, len(results.units)
    heads = sum(x.kv_groups * x.q_per_group for x in results.units)
    channels = sum(x.mlp_channels for x in results.units)
    return {
        "query heads": heads / (layers * dense.kv_groups * dense.q_per_group),
        "MLP channels": channels / (layers * dense.mlp_channels),
    }


def _is_stock(folder: Path, results: Results) -> bool:
    """Whether stock transformers loads the export: by its config, else by the plan."""
    text = _text(folder / "model" / "config.json")
    if text is None:
        return results.is_uniform
    try:
        config = json.loads(text)
    except json.JSONDecodeError:
        return results.is_uniform
    return isinstance(config, dict) and "auto_map" not in config


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _flat(value: JsonValue, name: str = "") -> list[tuple[str, str]]:
    """Return a nested JSON value as rows (dotted name, text)."""
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in _flat(inner, f"{name}.{key}" if name else key)
        ]
    if isinstance(value, list):
        return [(name, ", ".join(text for x in value for _, text in _flat(x)) or notation.MISSING)]
    return [(name, notation.MISSING if value is None else str(value))]


def _union(names: Any) -> list[str]:
    return list(dict.fromkeys(name for group in names for name in group))


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"R{index + 1}"
