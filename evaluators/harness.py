"""The one place that talks to lm-evaluation-harness: quiet, offline, fixed batches.

Numbers are the harness's own: the stock `lm_eval` command on the same task files, model, items
and batch size gives the same ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import huggingface_hub.constants
import lm_eval.api.task
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from evaluators.tasks import PREFIX, TASK_FILES

Progress = Callable[[int, int], None]
Request = tuple[tuple[str, str], list[int], list[int]]


class FixedBatchLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """The harness's transformers backend, reporting progress and asking no hub for anything.

    Logits are made from the first scored position of a batch onwards and not for its contexts,
    which the harness throws away: it aligns shorter logits at the end of the row.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, progress: Progress | None
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
        )
        self._keeps_some = "logits_to_keep" in signature(model.forward).parameters
        self._progress = progress
        self._first_scored: dict[tuple[int, ...], int] = {}
        self._rows_done = self._rows = 0

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation and whether it is the greedy one."""
        result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return result

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the stock method asks a hub for the model's revision."""
        return {}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._rows_done, self._first_scored = 0, {}
        # One forward row serves all continuations that differ in their last token only.
        self._rows = len({tuple(context + last[:-1]) for _, context, last in requests})
        for _, context, continuation in requests:
            row = (context + continuation)[-(self.max_length + 1) :][:-1]
            first = len(row) - len(continuation)
            key = _unpadded(row)
            self._first_scored[key] = min(first, self._first_scored.get(key, first))
        result: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return result

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        first = min(self._first_scored[_unpadded(row)] for row in inps.tolist())
        kept = {"logits_to_keep": inps.shape[1] - first} if self._keeps_some else {}
        logits: Tensor = self.model(inps, use_cache=False, **kept).logits
        self._rows_done += len(inps)
        if self._progress is not None:
            self._progress(self._rows_done, self._rows)
        return logits


@lru_cache(maxsize=4)
def load_tasks(names: tuple[str, ...]) -> Mapping[str, Any]:
    """Harness tasks by plain name, rows read once a process."""
    with _quiet_and_offline():
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
        loaded = manager.load([PREFIX + name for name in names])["tasks"]
    return {name: loaded[PREFIX + name] for name in names}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    items: Mapping[str, list[int]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, dict[str, Sequence[float]]]:
    """Per task and metric, the outcome of every item (1.0 or 0.0) in the order of `items`.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        tasks: From `load_tasks`.
        items: Ascending row numbers per task.
        batch_size: Rows a forward pass.
        progress: Called with (rows done, rows in all).
    """
    with _quiet_and_offline():
        language_model = FixedBatchLM(model, tokenizer, batch_size, progress)
        results = evaluate(
            lm=language_model,
            task_dict={"tasks": {PREFIX + name: task for name, task in tasks.items()}},
            samples={
                PREFIX + name: rows
                for name, rows in items.items()
                # The harness looks rows up in a list: whole sets go without.
                if len(rows) < len(tasks[name].eval_docs)
            },
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: _outcomes(results["samples"][PREFIX + name], items[name]) for name in tasks}


def _outcomes(logged: list[dict[str, Any]], items: list[int]) -> dict[str, Sequence[float]]:
    by_row = {entry["doc_id"]: entry for entry in logged}
    metrics = logged[0]["metrics"]
    return {metric: [float(by_row[row][metric]) for row in items] for metric in metrics}


def _unpadded(row: list[int]) -> tuple[int, ...]:
    """A row without the zeros at its end: the harness pads with token 0 on the right."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No log lines below errors, no bars, no network, inside the block only."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    variable = os.environ.get("HF_HUB_OFFLINE")
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
