"""Measuring the latency table on this device, once for every machine and model shape.

Whole models are timed, not blocks alone: one model a level, all of whose layers keep it, the other
kind of block dense. Their weights are views of the dense model's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pruning.families import family_of, window_of
from pruning.plan import Grid, Plan
from pruning.shaping import shaped
from pruning.streaming import is_streamed
from selfpruner.environment import (
    cpu_instructions,
    device_name,
    gpu_driver,
    package_version,
)
from selfpruner.latency_table import Detail, LatencyTable, Workload
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.stopwatch import take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_VARIABLE = "SELFPRUNER_CACHE"
_METHOD = 1  # of a change in how times are taken: tables of another one are measured anew
_SMALLEST_SIZE, _SPREAD = 0.2, 0.2
TABLE = "latency.json"


def stored_table(folder: RunFolder | None) -> LatencyTable | None:
    """Return the table that the run in `folder` began with, None where it has none yet."""
    if folder is None or not (folder.statistics / TABLE).is_file():
        return None
    return LatencyTable.from_json(folder.read_json(f"{folder.statistics.name}/{TABLE}"))


def store_table(table: LatencyTable, folder: RunFolder) -> None:
    """Write the table that the run in `folder` means from now on."""
    folder.statistics.mkdir(exist_ok=True)
    folder.write_json(f"{folder.statistics.name}/{TABLE}", table.to_json())


def known_table(
    model: PreTrainedModel,
    grid: Grid,
    workload: Workload,
    detail: Detail,
    progress: Progress,
    *,
    again: bool = False,
) -> LatencyTable:
    """Return the table of this machine from the cache, or measure it; always so with `again`."""
    key = _key(model, grid, workload, detail)
    text = json.dumps(key, sort_keys=True)
    folder = cache_folder() / "latency"
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not again and (folder / name).is_file():
        kept = RunFolder(folder).read_json(name)
        if kept.get("key") == key:
            return LatencyTable.from_json(kept["table"])
    table = measure(model, grid, workload, detail, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).write_json(name, {"key": key, "table": table.to_json()})
    except OSError as error:
        progress.note(f"the latency table is not kept: {error.strerror}: {folder}")
    return table


def measure(
    model: PreTrainedModel, grid: Grid, workload: Workload, detail: Detail, progress: Progress
) -> LatencyTable:
    """Return a table measured now.

    Raises:
        ValueError: the workload is longer than a sliding attention window, which is not timed.
    """
    window = window_of(model.config)
    if window is not None and workload.tokens >= window:
        raise ValueError(
            f"tokens: got {workload.tokens}, this model attends within a window of {window}; "
            "times are taken of less than that"
        )
    layers = family_of(model)[1].layers
    top = (len(grid.attention) - 1, len(grid.mlp) - 1)
    attention, mlp = detail.levels(grid)
    by_attention = {x: grid.plan([(x, top[1])] * layers) for x in attention}
    by_mlp = {x: grid.plan([(top[0], x)] * layers) for x in mlp}
    dense = grid.plan([top] * layers)
    whole = random_plans(grid, layers, detail.calibration, seed=0)
    if whole:
        whole += [dense, grid.plan([(0, 0)] * layers)]
    plans = list(dict.fromkeys([dense, *by_attention.values(), *by_mlp.values(), *whole]))
    with progress.stage(f"latency of {workload}", detail.rounds * len(plans)) as advance:
        rounds = timed(model, plans, workload, detail, on_visit=advance)
    repeats = repeatability(rounds[:, 1:])
    medians = dict(zip(plans, np.median(rounds, axis=0).tolist(), strict=True))
    table = LatencyTable.of_models(
        workload,
        grid.unit,
        grid.dense,
        layers,
        {grid.attention[x]: medians[plan] for x, plan in by_attention.items()},
        {grid.mlp[x]: medians[plan] for x, plan in by_mlp.items()},
        noise=repeats * medians[dense],
    )
    if whole:
        table = table.calibrated(whole, [medians[x] for x in whole])
    return table.with_repeatability(repeats)


def timed(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    workload: Workload,
    detail: Detail,
    on_visit: Any = lambda: None,
) -> NDArray[np.float64]:
    """Return milliseconds (rounds, plans) of whole models of these shapes, the dense one first."""
    family, _ = family_of(model)
    models = [shaped(model, plan) for plan in plans]
    return take_turns(
        models, family, workload, detail.rounds, graphs=detail.graphs, on_visit=on_visit
    )


def random_plans(grid: Grid, layers: int, count: int, seed: int) -> list[Plan]:
    """Return plans of all sizes, every layer at random about the size of its plan."""
    rng = np.random.default_rng(seed)
    plans = []
    for size in np.linspace(_SMALLEST_SIZE, 1.0, count + 2)[1:-1]:
        shares = np.clip(size + rng.normal(0, _SPREAD, (layers, 2)), 0, 1)
        tops = np.array([len(grid.attention) - 1, len(grid.mlp) - 1])
        plans.append(grid.plan([(int(a), int(m)) for a, m in np.rint(shares * tops)]))
    return plans


def repeatability(rounds: NDArray[np.float64]) -> float:
    """Return by how much every other round differs from the rest, relative, median over models."""
    even, odd = (np.median(rounds[start::2], axis=0) for start in (0, 1))
    return float(np.median(np.abs(even - odd) / np.median(rounds, axis=0)))


def cache_folder() -> Path:
    """Return where measurements outlive a run: `SELFPRUNER_CACHE`, or the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "selfpruner"


def _key(model: PreTrainedModel, grid: Grid, workload: Workload, detail: Detail) -> dict[str, Any]:
    """Return all that a table depends on."""
    on_gpu = model.device.type == "cuda"
    return {
        "method": _METHOD,
        "device": device_name(model.device),
        **(
            {"cuda": torch.version.cuda, "driver": gpu_driver()}
            if on_gpu
            else {"instructions": cpu_instructions()}
        ),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "dtype": str(model.dtype),
        "streamed": is_streamed(model),  # then layers share weights, which caches make too fast
        "architecture": asdict(family_of(model)[1]),
        "workload": asdict(workload),
        "unit": grid.unit,
        "attention": list(grid.attention),
        "mlp": [grid.mlp[0], grid.mlp[-1], len(grid.mlp)],
        "detail": asdict(detail),
    }
