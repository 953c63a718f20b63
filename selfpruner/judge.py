"""Judging models: dense and pruned on the same data at the same fixed batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from agent.drivers.decoding import Row, decode
from agent.drivers.embedded import stop_tokens
from evaluators.latency import compare_latency
from evaluators.memory import parameter_count, weight_bytes
from evaluators.perplexity import losses_of, perplexity_of, window_losses
from evaluators.significance import compare
from evaluators.tasks import MEAN_METRICS, TaskScore, evaluate_tasks, mean_accuracy
from pruning.families import Family
from pruning.streaming import batch_logits, is_streamed, streamed_sizes
from selfpruner.config import EvaluationSettings
from selfpruner.progress import Progress
from selfpruner.results import Difference, QualityNumbers, Sample, SpeedRow, TaskNumbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, a little robot",
    "To make a good cup of tea, you should first",
)
WARMUP = 2


def perplexities(
    model: nn.Module, family: Family, texts: Mapping[str, Tensor], batch_size: int
) -> dict[str, float]:
    """Return the perplexity of each reported text (windows (n, length))."""
    losses = {name: text_losses(model, family, x, batch_size) for name, x in texts.items()}
    return {name: float(perplexity_of(x, name).value) for name, x in losses.items()}


def text_losses(model: nn.Module, family: Family, windows_NL: Tensor, batch_size: int) -> Tensor:
    """Return the mean cross-entropy in nats of every window, shape (N,).

    Layers of a streamed model are read once for all windows.
    """
    if not is_streamed(model):
        return window_losses(model, windows_NL, batch_size)
    batches = [x.to(family.head(model).device) for x in windows_NL.split(batch_size)]
    return losses_of(batch_logits(model, family, batches), batches)


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    seed: int,
    progress: Progress,
    label: str,
) -> dict[str, TaskScore]:
    """Return the commonsense scores of one model; nothing where no task is asked for."""
    if not settings.tasks:
        return {}
    with progress.stage(f"tasks, {label}") as advance:
        done = 0

        def tell(rows: int, total: int) -> None:
            nonlocal done
            del total
            advance(rows - done)
            done = rows

        return evaluate_tasks(
            model,
            tokenizer,
            settings.tasks,
            samples=settings.samples,
            batch_size=settings.batch_size,
            seed=seed,
            progress=tell,
        )


def quality(scores: Mapping[str, TaskScore], texts: Mapping[str, float]) -> QualityNumbers:
    """Return the quality record of one model."""
    return QualityNumbers(
        perplexity=dict(texts),
        tasks={name: _task_numbers(name, score) for name, score in scores.items()},
        mean=mean_accuracy(scores) if scores else None,
    )


def difference(
    dense: Mapping[str, TaskScore], pruned: Mapping[str, TaskScore], seed: int
) -> Difference | None:
    """Return the paired difference of the task means, in points; None without tasks."""
    if not dense:
        return None
    before, after = (
        {name: score.correct for name, score in scores.items()} for scores in (dense, pruned)
    )
    found = compare(before, after, seed=seed)
    return Difference(points=found.points, ci95=found.ci95, mcnemar=found.mcnemar)


def speed_rows(
    dense: nn.Module, pruned: nn.Module, settings: EvaluationSettings, seed: int
) -> tuple[SpeedRow, ...]:
    """Return prefill and decode times of both models, interleaved; none of streamed ones."""
    if is_streamed(dense) or is_streamed(pruned):
        return ()
    asked = settings.speed
    rows = compare_latency(
        {"dense": dense, "pruned": pruned},
        batch=asked.batch,
        prompt_tokens=asked.prompt_tokens,
        new_tokens=asked.new_tokens,
        repeats=asked.repeats,
        warmup=WARMUP,
        seed=seed,
    )
    return tuple(SpeedRow(**row) for row in rows)


def samples(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 32,
) -> tuple[Sample, ...]:
    """Return greedy continuations of fixed prompts by both models; none by streamed ones."""
    if is_streamed(dense) or is_streamed(pruned):
        return ()
    before, after = (continuations(x, tokenizer, prompts, new_tokens) for x in (dense, pruned))
    return tuple(
        Sample(prompt=prompt, dense=one, pruned=other)
        for prompt, one, other in zip(prompts, before, after, strict=True)
    )


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """Return the greedy continuation of each prompt by at most `new_tokens` tokens."""
    stops = stop_tokens(model, tokenizer)
    rows = [Row(stops, new_tokens) for _ in prompts]
    decode(model, [list(tokenizer(x)["input_ids"]) for x in prompts], rows, pad=stops[0])
    return [tokenizer.decode(row.reply, skip_special_tokens=True) for row in rows]


def _task_numbers(name: str, score: TaskScore) -> TaskNumbers:
    normalised = MEAN_METRICS[name] == "acc_norm"
    return TaskNumbers(
        acc=score.acc,
        acc_norm=score.acc_norm,
        stderr=score.acc_norm_stderr if normalised else score.stderr,
        n=score.n,
        split=score.split,
    )


def sizes(model: nn.Module) -> dict[str, int]:
    """Return parameters (tied weights once) and weight bytes, those on disk too."""
    if is_streamed(model):
        parameters, num_bytes = streamed_sizes(model)
        return {"parameters": parameters, "bytes": num_bytes}
    return {"parameters": parameter_count(model), "bytes": weight_bytes(model)}
