"""The command `evaluate`: any model, alone or beside a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from evaluators.tasks import MEAN_CONVENTION, TaskScore, mean_accuracy
from pruning.loading import load, load_spread, whereabouts
from selfpruner import judge
from selfpruner.config import EvaluationSettings, RunConfig
from selfpruner.notation import p_value
from selfpruner.progress import Progress
from selfpruner.settings import Task
from selfpruner.workbench import resolved_dtype, settle_process, usable_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_command(
    model: str,
    *,
    baseline: str | None,
    tasks: Sequence[Task],
    samples: int | None,
    batch_size: int,
    spread: bool | None,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Print the commonsense accuracy of `model`, paired with `baseline` where one is given.

    `spread` says whether each is spread over all GPUs, CPU memory and disk; None does so where
    more than one GPU is visible. One model is open at a time.

    Raises:
        ValueError: a model cannot be loaded; one line.
    """
    settings = EvaluationSettings(tasks=tuple(tasks), samples=samples, batch_size=batch_size)
    scores: dict[str, dict[str, TaskScore]] = {}
    for name in _names(model, baseline):
        loaded, tokenizer = _loaded(name, spread, trust_remote_code, progress)
        scores[name] = judge.tasks(loaded, tokenizer, settings, 0, progress, name)
        del loaded
    difference = None
    if baseline is not None and baseline != model:
        difference = judge.difference(scores[baseline], scores[model], 0)
    p_values = {} if difference is None else difference.mcnemar or {}
    table = Table(title=MEAN_CONVENTION, title_justify="left")
    for heading in ("task", "n", *scores, *(["McNemar p"] if p_values else [])):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in tasks:
        found = [x[task] for x in scores.values()]
        p_cells = [p_value(p_values[task])] if p_values else []
        table.add_row(task, str(found[0].n), *(_shown(x) for x in found), *p_cells)
    table.add_row("mean", "", *(f"{100 * mean_accuracy(x):.2f}" for x in scores.values()))
    console = Console()
    console.print(table)
    if difference is not None:
        low, high = difference.ci95
        console.print(
            f"difference {difference.points:+.2f} points, "
            f"95 % interval {low:+.2f} to {high:+.2f}, paired by item. "
            + difference.resolution([x.n for x in scores[model].values()])
        )


def _names(model: str, baseline: str | None) -> list[str]:
    """Return the models to load, the baseline first."""
    return [model] if baseline in (None, model) else [str(baseline), model]


def _loaded(
    name: str, spread: bool | None, trust_remote_code: bool, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settle_process()
    config = RunConfig(model=name)
    spreads = torch.cuda.device_count() > 1 if spread is None else spread
    with progress.stage(f"load {name}"):
        loaded, tokenizer = (load_spread if spreads else load)(
            name,
            resolved_dtype(config),
            usable_device(config),
            trust_remote_code=trust_remote_code,
        )
    if spreads:
        progress.note(f"{name}: {whereabouts(loaded)}")
    return loaded, tokenizer


def _shown(score: TaskScore) -> str:
    normalised = "" if score.acc_norm is None else f", norm {100 * score.acc_norm:.2f}"
    return f"{100 * score.acc:.2f}{normalised}"
