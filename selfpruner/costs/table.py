"""The estimate as text: a table of stages, what does not fit, and what was assumed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from selfpruner.costs.estimate import CostEstimate, StageCost, devices_needed
from selfpruner.notation import MISSING, duration, short, size, whole

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("stage", "time", "peak memory", "devices needed", "tokens", "LLM tokens", "cost")

ASSUMPTIONS = (
    "Time of a piece of work is the longest of operations over the share of the peak that is "
    "reached, bytes over bandwidth, and layers started one by one; the hardware file has them all.",
    "The program keeps everything on one device: further devices hold more and are paid for, they "
    "shorten nothing but the searches, and those only with --workers, which share out scores and "
    "cuts; what they read from one disk takes as long as before. The split of a model over devices "
    "is not built but for the tasks of a streamed run: there each model in turn lies on all "
    "devices, and what nine tenths of them do not hold is moved from CPU memory once a batch.",
    "From the calibration to the end of the refit the corrections of every layer are held, "
    "4 N² + 8 O N bytes for an output projection (O, N), without least squares 4 N² + 4 O N; Gram "
    "matrices are those of one layer at a time. With memory: streamed they are on disk, as the "
    "weights are, and read from there each time that plans go through the layers.",
    "Peak memory is of tensors; the process takes about reserved_gib of the hardware file more.",
    "Every evaluation counts in full. Cuts of plans that fit the cache of 512 MiB are solved once "
    "a level, others for every plan and round. Branches that plans share and the limits of "
    "the search on calls, tokens, money and time are left out.",
    "Plans cost what the budget leaves of the blocks, in parameters, operations and bytes alike; a "
    "speedup s is taken for a share 1/s of the bytes.",
    "Tokens of the LLM are those of the first prompt and of half the longest reply, a quarter more "
    "for repairs; tokens of tasks are those of SmolLM2's tokenizer.",
    "Prices, shares of the peak, seconds of the start and of a layer are examples in the hardware "
    "file, to be edited. Downloads and waiting for a machine are not in it.",
)


def header(found: CostEstimate) -> list[str]:
    """Return what is pruned, to what, and where."""
    machine = found.hardware
    return [
        f"{found.model}: {whole(found.parameters_dense)} parameters "
        f"({size(found.weight_bytes)}) to {whole(found.parameters_pruned)} "
        f"({size(found.export_bytes)} exported)",
        f"{_machines(found)}, {size(machine.usable_bytes)} usable each; "
        f"{whole(found.evaluations)} evaluations, {whole(found.llm_calls)} calls of the LLM",
    ]


def rows(found: CostEstimate) -> list[tuple[str, ...]]:
    """Return a row of texts a stage and the sum, in the order of `COLUMNS`."""
    currency = found.hardware.price.currency
    lines = [_row(stage, found) for stage in found.stages]
    total = (
        "all",
        _about(found.seconds),
        size(found.peak.memory.total),
        str(found.peak.devices_needed),
        short(found.tokens),
        short(found.llm_tokens),
        f"{_money(found.money)} {currency}",
    )
    return [*lines, total]


def notes(found: CostEstimate) -> list[str]:
    """Return what does not fit one device and what would, one line each; nothing where all fits."""
    large, machine = found.too_large(), found.hardware
    if not large:
        return []
    peak = max(large, key=lambda stage: stage.memory.total)
    return [
        f"Does not fit one device: {', '.join(x.name for x in large)}. {peak.name} holds "
        f"{size(peak.memory.total)} ({_parts(peak)}), one {machine.description} "
        f"{size(machine.usable_bytes)}.",
        f"{peak.devices_needed} such devices would hold it if the model were split over them, "
        f"which is not built; or one with "
        f"{math.ceil(peak.memory.total / 2**30 + machine.reserved_gib)} GiB.",
        *_advice(found),
    ]


def _advice(found: CostEstimate) -> list[str]:
    """Return what streaming would come to, where it is not what was asked about.

    Tasks of a streamed run take nine tenths of any device and are no measure of what it needs.
    """
    streamed = max(stage.streamed.total for stage in found.stages if stage.name != "tasks")
    if streamed >= found.peak.memory.total:
        return []
    return [
        f"With memory: streamed the peak would be {size(streamed)}: devices needed "
        f"{devices_needed(streamed, found.hardware)}; {size(found.scratch_bytes)} on disk."
    ]


def plain(found: CostEstimate) -> str:
    """Return everything as lines of plain text."""
    table = [COLUMNS, *rows(found)]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]
    told = [*header(found), "", *lines, ""]
    told += [f"! {note}" for note in notes(found)]
    return "\n".join([*told, "Assumed:", *(f"- {text}" for text in ASSUMPTIONS)])


def rich_table(found: CostEstimate) -> Table:
    """Return the table for a terminal; stages that do not fit are red."""
    from rich.table import Table

    table = Table()
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    large = {stage.name for stage in found.too_large()}
    *stages, total = rows(found)
    for row in stages:
        table.add_row(*row, style="red" if row[0] in large else None)
    table.add_section()
    table.add_row(*total, style="bold")
    return table


def show(found: CostEstimate) -> None:
    """Print the estimate: a table on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        print(plain(found))
        return
    for line in header(found):
        console.print(line, markup=False)
    console.print(rich_table(found))
    for note in notes(found):
        console.print(note, style="red", markup=False)
    console.print("Assumed:", *(f"- {text}" for text in ASSUMPTIONS), sep="\n", style="dim")


def _row(stage: StageCost, found: CostEstimate) -> tuple[str, ...]:
    return (
        stage.name,
        _about(stage.seconds),
        size(stage.memory.total),
        str(stage.devices_needed),
        short(stage.tokens) if stage.tokens else MISSING,
        short(stage.llm_tokens) if stage.llm_tokens else MISSING,
        f"{_money(stage.money)} {found.hardware.price.currency}",
    )


def _machines(found: CostEstimate) -> str:
    machine = found.hardware
    count = f"{machine.devices} x " if machine.devices > 1 else ""
    return f"{count}{machine.description}"


def _about(seconds: float) -> str:
    """Return seconds without more digits than an estimate has."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else duration(seconds)


def _money(value: float) -> str:
    return f"{value:.2f}"


def _parts(stage: StageCost) -> str:
    """Return the three largest holders of memory."""
    parts = sorted(vars(stage.memory).items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {size(value)}" for name, value in parts if value)
