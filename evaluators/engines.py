"""Speed of model files in the engines that serve them, each model in a process of its own.

Two models take turns, first one ahead, then the other, so that drift hits both alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from evaluators.engine_process import EngineError, EngineProcess

NAMES = ("transformers", "vllm", "llama.cpp")
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Source:
    """What an engine loads: a folder or hub id, a `.gguf` path, or a folder and its GGUF file."""

    model: str
    gguf_file: str | None = None


@dataclass(frozen=True)
class Settings:
    """What all engines are told. `threads` is of each process, `seconds` a bound on one case.

    A case gets `repeats` timed repeats after `warmup` untimed ones, or as many as fit into
    `seconds`, but three at least. `prepare` is `module:function`, called in each process first.
    """

    dtype: str
    device: str
    threads: int
    repeats: int = 5
    warmup: int = 1
    seconds: float = 60.0
    trust_remote_code: bool = False
    prepare: str | None = None


@dataclass(frozen=True)
class Case:
    """A batch of prompts of `tokens` tokens each, then `new_tokens` decode steps."""

    batch: int
    tokens: int
    new_tokens: int


Tell = Callable[[Case], None]


@dataclass(frozen=True)
class Row:
    """One quantity in one case; by model: the median and quartiles in milliseconds.

    `phase` is prefill or decode (one step), or products: a prefill's matrix products alone.
    `tokens_per_second` counts the batch: prompt tokens, or one new token a sequence. With two
    models, `speedup` is the first's median over the second's, `quartiles` those of the ratio over
    repeats.
    """

    phase: str
    batch: int
    tokens: int
    repeats: int
    ms: dict[str, float]
    spread_ms: dict[str, tuple[float, float]]
    tokens_per_second: dict[str, float]
    speedup: float | None
    quartiles: tuple[float, float] | None


@dataclass(frozen=True)
class Bytes:
    """What one decode step has to read, by model, and the speedup if it did nothing else."""

    batch: int
    tokens: int
    by_model: dict[str, int]
    speedup: float | None


@dataclass(frozen=True)
class EngineReport:
    """One engine's figures.

    `facts` by model: version, dtype, threads, mode, context, load_seconds (from the engine's
    import until it is ready), and of the whole process tree peak_bytes; device_bytes where the
    engine knows them; file_bytes where the weights are files here; parameters and weight_bytes in
    transformers. `absent` says why there is nothing: not installed, or what went wrong.
    """

    engine: str
    facts: dict[str, dict[str, Any]]
    rows: tuple[Row, ...] = ()
    bytes: tuple[Bytes, ...] = ()
    skipped: tuple[str, ...] = ()
    absent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def compare_engine(
    engine: str,
    models: Mapping[str, Source],
    cases: Sequence[Case],
    settings: Settings,
    *,
    python: str | None = None,
    tell: Tell = lambda _: None,
) -> EngineReport:
    """Return the times of one model, or of a baseline and a second one, in one engine.

    An engine that is not installed, refuses a model or dies is reported as such: `absent` where
    there is nothing at all, else a line in `skipped` and what was measured before.

    Args:
        engine: One of `NAMES`.
        models: Sources by name.
        cases: What to time, in order.
        settings: What the engines are told.
        python: Interpreter that has the engine; None takes this one.
        tell: Called after each case.

    Raises:
        ValueError: an unknown engine, or not one or two models.
    """
    if engine not in NAMES or not 1 <= len(models) <= 2:
        raise ValueError(
            f"engines: got {engine!r} with {len(models)} models; "
            f"allowed: {', '.join(NAMES)}, 1 or 2 models"
        )
    comparison = _Comparison(engine, models, settings)
    with ExitStack() as stack:
        try:
            reason = comparison.load(stack, cases, python or sys.executable)
            if reason is not None:
                return EngineReport(engine, {}, absent=reason)
            for case in cases:
                comparison.measure(case)
                tell(case)
        except EngineError as error:
            return comparison.report(failure=str(error))
        return comparison.report()


def file_bytes(source: Source) -> int | None:
    """Return the bytes of the weight files of a source, a hub id's where they were downloaded.

    None where there are none here, and for a packed file that the engine unpacks: what it runs has
    other bytes.
    """
    path = Path(source.model)
    if source.gguf_file is not None:
        return None
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        config = try_to_load_from_cache(source.model, "config.json")
        if not isinstance(config, str):
            return None
        path = Path(config).parent
    files = [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
    twice = "consolidated"  # the same weights again, in the format of another program
    return sum(x.stat().st_size for x in files if not x.name.startswith(twice))


class _Comparison:
    """The workers of one engine, and what they have said so far."""

    def __init__(self, engine: str, models: Mapping[str, Source], settings: Settings) -> None:
        self._engine, self._models, self._settings = engine, models, settings
        self._can_products = engine == "transformers"
        self._can_bytes = engine != "vllm"
        self._keeps_free = int(engine == "vllm")  # it ends one position before its context is full
        self._workers: dict[str, EngineProcess] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._rows: list[Row] = []
        self._bytes: list[Bytes] = []
        self._skipped: list[str] = []

    def load(self, stack: ExitStack, cases: Sequence[Case], python: str) -> str | None:
        """Start a worker for each model; return why the engine is absent, None when it is there."""
        for name, source in self._models.items():
            worker = stack.enter_context(EngineProcess.started(python, self._settings.threads))
            answer = worker.ask(
                {
                    **asdict(source),
                    "engine": self._engine,
                    "dtype": self._settings.dtype,
                    "device": self._settings.device,
                    "threads": self._settings.threads,
                    "trust_remote_code": self._settings.trust_remote_code,
                    "prepare": self._settings.prepare,
                    "models": len(self._models),
                    "most_batch": max(x.batch for x in cases),
                    "most_tokens": max(x.tokens + x.new_tokens for x in cases),
                }
            )
            if "ok" not in answer:
                return str(answer.get("missing") or answer["skip"])
            self._workers[name] = worker
            self._facts[name] = {**answer["ok"], "file_bytes": file_bytes(source)}
        return None

    def measure(self, case: Case) -> None:
        """Add the rows of one case, or the reason why it is left out.

        A prompt that fills the model's context is timed as much shorter as the new tokens need.
        """
        context = min(x["context"] for x in self._facts.values())
        room = context - self._keeps_free
        if case.tokens > context or case.new_tokens >= room:
            asked = case.tokens + case.new_tokens
            self._skip(case, f"{asked} positions, the model has {context}")
            return
        if case.tokens + case.new_tokens > room:
            shorter = replace(case, tokens=room - case.new_tokens)
            self._skip(case, f"timed with {shorter.tokens}, the model has {context} positions")
            case = shorter
        sizes = {"batch": case.batch, "tokens": case.tokens, "seed": 0}
        turns = self._take_turns(case, {"do": "measure", **sizes, "new_tokens": case.new_tokens})
        if turns is None:
            return
        self._rows += [_row(phase, case, turns) for phase in ("prefill", "decode")]
        if self._can_bytes:
            self._add_bytes(case)
        if self._can_products:
            products = self._take_turns(case, {"do": "products", **sizes})
            if products is not None:
                self._rows.append(_row("products", case, products))

    def report(self, failure: str | None = None) -> EngineReport:
        """Return all that was measured; what failed is absent, or skipped after some rows."""
        for name, worker in self._workers.items():
            with suppress(EngineError):
                device_bytes = worker.ask({"do": "device_bytes"})["ok"]
                peak = {"peak_bytes": worker.peak_bytes(), "device_bytes": device_bytes}
                self._facts[name] |= peak
        skipped = self._skipped + ([failure] if failure and self._rows else [])
        absent = failure if failure and not self._rows else None
        rows, read = tuple(self._rows), tuple(self._bytes)
        return EngineReport(self._engine, self._facts, rows, read, tuple(skipped), absent)

    def _take_turns(
        self, case: Case, request: Mapping[str, Any]
    ) -> dict[str, list[dict[str, float]]] | None:
        """Return the answers of each repeat by model; None once a model says it does not fit."""
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in self._workers}
        order = list(self._workers.items())
        started = time.monotonic()
        for repeat in range(-self._settings.warmup, self._settings.repeats):
            is_late = time.monotonic() - started > self._settings.seconds
            if repeat >= LEAST_REPEATS and is_late:
                break
            for name, worker in order:
                answer = worker.ask(request)
                if "skip" in answer:
                    self._skip(case, f"{name}: {answer['skip']}")
                    return None
                if repeat >= 0:
                    answers[name].append(answer["ok"])
            order.reverse()
        return answers

    def _add_bytes(self, case: Case) -> None:
        context = case.tokens + (case.new_tokens + 1) // 2  # half way through the steps
        request = {"do": "step_bytes", "batch": case.batch, "context": context}
        answers = {name: x.ask(request) for name, x in self._workers.items()}
        for name, answer in answers.items():
            if "skip" in answer:
                self._skip(case, f"{name}: bytes of a step: {answer['skip']}")
                return
        found = {name: int(answer["ok"]["bytes"]) for name, answer in answers.items()}
        sizes = list(found.values())
        speedup = sizes[0] / sizes[1] if len(sizes) == 2 else None
        self._bytes.append(Bytes(case.batch, case.tokens, found, speedup))

    def _skip(self, case: Case, reason: str) -> None:
        self._skipped.append(f"batch {case.batch}, {case.tokens} tokens: {reason}")


def _row(phase: str, case: Case, turns: Mapping[str, Sequence[Mapping[str, float]]]) -> Row:
    seconds_MR = np.array([[turn[phase] for turn in found] for found in turns.values()])
    names = list(turns)
    medians = np.median(seconds_MR, axis=1)
    spreads = np.percentile(1000 * seconds_MR, [25, 75], axis=1).T
    tokens = case.batch * (1 if phase == "decode" else case.tokens)
    speedup = quartiles = None
    if len(names) == 2:
        low, high = np.percentile(seconds_MR[0] / seconds_MR[1], [25, 75])
        speedup, quartiles = float(medians[0] / medians[1]), (float(low), float(high))
    return Row(
        phase=phase,
        batch=case.batch,
        tokens=case.tokens,
        repeats=seconds_MR.shape[1],
        ms=dict(zip(names, (1000 * medians).tolist(), strict=True)),
        spread_ms={n: (float(a), float(b)) for n, (a, b) in zip(names, spreads, strict=True)},
        tokens_per_second=dict(zip(names, (tokens / medians).tolist(), strict=True)),
        speedup=speedup,
        quartiles=quartiles,
    )
