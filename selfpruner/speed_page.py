"""The speed report for readers: tables in the terminal, and one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from evaluators.engines import EngineReport
from selfpruner.notation import MISSING, counted, number, percent, size, times, whole
from selfpruner.report import page_environment, write_page
from selfpruner.speed import PREFILL_TARGET, Line, SpeedReport

# Label, key of the facts, how it is written.
FACTS: tuple[tuple[str, str, Any], ...] = (
    ("version", "version", str),
    ("how it runs", "mode", str),
    ("dtype", "dtype", str),
    ("threads", "threads", str),
    ("parameters", "parameters", whole),
    ("weights in memory", "weight_bytes", size),
    ("weight files", "file_bytes", size),
    ("load time, s", "load_seconds", number),
    ("peak memory of the process", "peak_bytes", size),
    ("peak memory of the device", "device_bytes", size),
)


def show_speed(report: SpeedReport, out: Path | None) -> None:
    """Print the tables; write all figures as `out`, JSON or a page by its name, where asked to."""
    console = Console()
    print_speed(report, console)
    if out is None:
        return
    if out.suffix == ".html":
        write_speed_page(report, out)
    else:
        report.write(out)
    console.print(f"report: {out}", highlight=False, markup=False, soft_wrap=True)


def print_speed(report: SpeedReport, console: Console) -> None:
    """Print a table of facts and a table of times for every engine, and what is missing."""
    console.print(report.device, highlight=False, markup=False)
    for role, name in report.models.items():
        console.print(f"{role}: {name}", highlight=False, markup=False)
    for engine in report.engines:
        console.print()
        if engine.absent is not None:
            console.print(f"{engine.engine}: {engine.absent}", highlight=False, markup=False)
            continue
        console.print(_table(engine.engine, ("", *report.models), fact_rows(engine)))
        heads = ("tokens/s", *report.models, "speedup", "quartiles", "ideal", "reached")
        console.print(_table("", heads, [_short(x) for x in _lines(report, engine)]))
        for line in engine.skipped:
            console.print(f"skipped: {line}", highlight=False, markup=False)
    console.print()
    for note in notes(report):
        console.print(note, highlight=False, markup=False)


def write_speed_page(report: SpeedReport, out: Path) -> Path:
    """Write the page and return its path."""
    text = page_environment().get_template("speed.html.j2").render(
        report=report,
        cards=cards(report),
        heads=time_heads(report),
        engines=[(x, fact_rows(x), time_rows(report, x)) for x in report.engines],
        notes=notes(report),
        versions=sorted(report.environment["versions"].items()),
    )  # fmt: skip
    return write_page(out, text)


def time_heads(report: SpeedReport) -> list[str]:
    """Return the headings of the columns of times."""
    return [f"{role}, {unit}" for role in report.models for unit in ("ms", "tokens/s")]


def fact_rows(engine: EngineReport) -> list[list[str]]:
    """Return what the times of an engine depend on: a label, then one cell a model."""
    found = list(engine.facts.values())
    return [
        [label, *(MISSING if x.get(key) is None else write(x[key]) for x in found)]
        for label, key, write in FACTS
        if any(x.get(key) is not None for x in found)
    ]


def time_rows(report: SpeedReport, engine: EngineReport) -> list[list[str]]:
    """Return the cells of an engine's times, speedups with their quartiles."""
    return [list(_cells(x)) for x in _lines(report, engine)]


def cards(report: SpeedReport) -> list[tuple[str, str, str]]:
    """Return title, figure and explanation of the best row of each engine and phase."""
    found: list[tuple[str, str, str]] = []
    for engine in report.engines:
        for phase in ("prefill", "decode"):
            rows = [x for x in engine.rows if x.phase == phase and x.speedup is not None]
            if rows:
                best = max(rows, key=lambda x: x.speedup or 0.0)
                where = f"the best of {len(rows)}: batch {best.batch}, {best.tokens} tokens"
                found.append((f"{engine.engine}, {phase}", times(best.speedup), where))
    return found


def notes(report: SpeedReport) -> list[str]:
    """Return how the figures were made and how they are to be read."""
    settings = report.settings
    repeats, threads = counted(settings.repeats, "repeat"), counted(settings.threads, "thread")
    said = [
        f"Medians of up to {repeats} after {settings.warmup} untimed, random prompts, models in "
        "turn; decode is one step. Quartiles are over repeats.",
        f"{threads} a process, {settings.dtype} (llama.cpp: what the file has). batch x tokens: "
        "sequences side by side, and the prompt of each.",
    ]
    if settings.device == "cuda":
        said.append("llama.cpp runs on the CPU, in small sizes where none are asked for.")
        said.append(
            "transformers runs eagerly here: at small batches kernel launches, which narrower "
            "layers do not spare, bound a decode step."
        )
    if len(report.models) < 2:
        return said
    said.append(
        "ideal: for prefill the speedup of the model's matrix products timed alone in "
        "transformers, for decode the ratio of the bytes that a step reads (weights, KV cache)."
    )
    held = [x for x in report.lines() if x.row.phase == "prefill" and x.reached is not None]
    if held:
        good = sum(x.reached >= PREFILL_TARGET for x in held if x.reached is not None)
        target = f"{100 * PREFILL_TARGET:.0f} %"
        said.append(f"{good} of {len(held)} prefill rows reach {target} of their ideal.")
    return said


def _lines(report: SpeedReport, engine: EngineReport) -> list[Line]:
    return [x for x in report.lines() if x.engine == engine.engine]


def _short(line: Line) -> list[str]:
    """Return the cells of a terminal's width: no milliseconds."""
    row = line.row
    low_high = (
        MISSING if row.quartiles is None else f"{row.quartiles[0]:.2f}-{row.quartiles[1]:.2f}"
    )
    rates = [number(x, 1) for x in row.tokens_per_second.values()]
    label = f"{row.phase} {row.batch}x{row.tokens}"
    found = [times(row.speedup), low_high, times(line.ideal), percent(line.reached, 0)]
    return [label, *rates, *found]


def _cells(line: Line) -> Iterator[str]:
    row = line.row
    yield from (row.phase, str(row.batch), str(row.tokens))
    for role, milliseconds in row.ms.items():
        yield from (number(milliseconds), number(row.tokens_per_second[role], 1))
    if row.quartiles is None:
        yield from (MISSING, MISSING, MISSING)
        return
    low, high = row.quartiles
    yield f"{times(row.speedup)} ({low:.2f} to {high:.2f})"
    yield from (times(line.ideal), percent(line.reached, 0))


def _table(title: str, heads: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=SIMPLE)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
