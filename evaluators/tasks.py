"""The seven commonsense tasks, zero-shot, through lm-evaluation-harness and local task files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TASK_FILES = Path(__file__).parent / "task_files"
PREFIX = "selfpruner_"
SPLIT = "validation"
# The metric of each task that enters the mean.
MEAN_METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
TASKS = tuple(MEAN_METRICS)
MEAN_CONVENTION = (
    "unweighted mean over tasks, zero-shot: acc for boolq, piqa, winogrande, arc_easy; "
    "acc_norm (log-likelihood per character) for hellaswag, arc_challenge, openbookqa"
)


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one model on one task.

    Attributes:
        acc: Share of items whose right choice is the most likely, 0 to 1.
        acc_norm: The same with log-likelihoods per character; None where it has no meaning.
        stderr: Standard error of `acc`; None for a single item.
        acc_norm_stderr: Standard error of `acc_norm`; None like `stderr` and `acc_norm`.
        n: Number of items.
        split: Split of the data set the items come from.
        correct: Per item 1 or 0, of the metric that enters the mean.
        items: Row numbers of the items in the split, ascending.
    """

    acc: float
    acc_norm: float | None
    stderr: float | None
    acc_norm_stderr: float | None
    n: int
    split: str
    correct: tuple[int, ...]
    items: tuple[int, ...]


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    *,
    samples: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskScore]:
    """Scores a causal language model on the named tasks.

    Args:
        model: A transformers model; scored on its own device, in its own dtype.
        tokenizer: Its tokenizer.
        tasks: Names out of `TASKS`.
        samples: Items a task, a random subset fixed by `seed` (equal for every model); None for
            all items.
        batch_size: Rows a forward pass; keep it equal across compared models, because results in
            low precision depend on it.
        seed: Seed of the subset.
        progress: Called with (rows done, rows in all) after each forward pass.

    Raises:
        ValueError: For an unknown task, or when the package with the rows is not installed.
    """
    _check(tasks, samples, batch_size)
    from evaluators.harness import load_tasks, run_tasks

    loaded = load_tasks(tuple(tasks))
    items = {task: subset(len(loaded[task].eval_docs), samples, task, seed) for task in loaded}
    outcomes = run_tasks(model, tokenizer, loaded, items, batch_size=batch_size, progress=progress)
    return {task: _score(task, items[task], outcomes[task]) for task in tasks}


def task_texts(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Every text field of every item, by task; `evaluate_tasks` reads the same rows once.

    Raises:
        ValueError: For an unknown task, or when the package with the rows is not installed.
    """
    _check(tasks, None, 1)
    from evaluators.harness import load_tasks

    return {
        name: [text for row in task.eval_docs for text in row.values() if isinstance(text, str)]
        for name, task in load_tasks(tuple(tasks)).items()
    }


def mean_accuracy(scores: Mapping[str, TaskScore]) -> float:
    """Mean over tasks by `MEAN_CONVENTION`, 0 to 1."""
    if not scores:
        raise ValueError("mean_accuracy: got no task, need at least one")
    return float(np.mean([np.mean(score.correct) for score in scores.values()]))


def subset(count: int, samples: int | None, task: str, seed: int) -> list[int]:
    """Ascending row numbers: all of `count`, or `samples` of them drawn without replacement."""
    if samples is None or samples >= count:
        return list(range(count))
    # The task's place in the list, not its name's hash: stable between processes.
    rng = np.random.default_rng((seed, TASKS.index(task)))
    return sorted(int(row) for row in rng.choice(count, size=samples, replace=False))


def _check(tasks: Sequence[str], samples: int | None, batch_size: int) -> None:
    unknown = [task for task in tasks if task not in MEAN_METRICS]
    if unknown or not tasks:
        raise ValueError(f"tasks: got {', '.join(unknown) or 'none'}, allowed {', '.join(TASKS)}")
    if (samples is not None and samples < 1) or batch_size < 1:
        raise ValueError(
            f"tasks: got samples {samples} and batch_size {batch_size}, "
            "allowed samples >= 1 or null, batch_size >= 1"
        )


def _score(task: str, items: list[int], outcomes: Mapping[str, Sequence[float]]) -> TaskScore:
    acc, acc_norm = outcomes["acc"], outcomes.get("acc_norm")
    return TaskScore(
        acc=float(np.mean(acc)),
        acc_norm=None if acc_norm is None else float(np.mean(acc_norm)),
        stderr=_stderr(acc),
        acc_norm_stderr=None if acc_norm is None else _stderr(acc_norm),
        n=len(items),
        split=SPLIT,
        correct=tuple(int(value) for value in outcomes[MEAN_METRICS[task]]),
        items=tuple(items),
    )


def _stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean from the sample standard deviation."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
