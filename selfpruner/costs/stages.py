"""The stages of a run: what each computes, holds and reads, in the order of the pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from agent.settings import Endpoint, Operators
from pruning.architecture import Architecture
from selfpruner.config import RunConfig
from selfpruner.costs import judging, surgery
from selfpruner.costs.hardware import Precision
from selfpruner.costs.known_models import architecture_by_name
from selfpruner.costs.llm import Asking
from selfpruner.costs.memory import CACHE_BYTES, Memory, MemoryModel
from selfpruner.costs.work import BYTES, Running, Work

TEXT_TERMS = ("kl", "kl_top512", "perplexity")
_SPEED_RUNS = 4 * 6  # forward passes of the speed model: four plans, six rounds
_SAMPLES, _SAMPLE_TOKENS = 4, 32  # continuations that the report shows
_ASKED_TOKENS = 0.4  # share of a reply that takes a forward pass; the grammar forces the rest
_SERVER_SECONDS = 60  # until a vLLM server answers
_API_TOKENS_A_SECOND = 50
_API_LATENCY = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as the command shows it, or what it does.
        works: pieces of work, one after another.
        memory: at the peak.
        tokens: that pass through a model, all models together.
        llm_tokens, llm_cost: prompts and replies of the LLM, and money for them.
    """

    name: str
    works: tuple[Work, ...]
    memory: Memory
    tokens: float = 0.0
    llm_tokens: int = 0
    llm_cost: float = 0.0


@dataclass(frozen=True)
class RunStages:
    """All stages of one run.

    Attributes:
        config: of the run.
        architecture: of the dense model.
        precision: of forward passes.
        kept: share of the blocks that the budget leaves, above 0 to 1.
        llm: what the search will ask.
        start_seconds: until the process can compute.
    """

    config: RunConfig
    architecture: Architecture
    precision: Precision
    kept: float
    llm: Asking
    start_seconds: float

    def all(self) -> list[Stage]:
        """Return the stages in order, empty ones left out."""
        stages = [
            self.load(),
            self.calibrate(),
            self.rank(),
            self.search(),
            self.ask(),
            self.front(),
            self.select(),
            self.refit(),
            self.controls(),
            self.export(),
            self.perplexity(),
            self.tasks(),
            self.speed(),
        ]
        return [stage for stage in stages if stage.works]

    def load(self) -> Stage:
        """Return start-up, and reading the dense weights."""
        work = Work(disk=self.dense.weight_bytes, waiting=self.start_seconds)
        return Stage("load", (work,), self.memory.load())

    def calibrate(self) -> Stage:
        """Return the dense pass over the calibration tokens with its Gram matrices."""
        works = self._calibration(self.dense)
        return Stage("calibrate", works, self.memory.calibrate(), self._calibration_tokens)

    def rank(self) -> Stage:
        """Return ranking, corrections and the timing of the speed model."""
        length = self.config.data.length
        timed = _SPEED_RUNS * length
        half = replace(self.dense, kept=0.5)
        works = (
            *surgery.ranking(self._shapes, self.config.pruning),
            half.passes(timed, length, 1),
        )
        return Stage("rank, correct", works, self.memory.calibrate(), timed)

    def search(self) -> Stage:
        """Return scoring: evaluations of all search tokens, cuts, items of every generation."""
        count = self.evaluations
        tokens = count * self._search_tokens
        works = [*self._references(self._search_tokens), *self._scores(count, self._search_tokens)]
        works += self._cuts(count, self._search_tokens)
        items = self.config.data.choices
        looked = (count if self.config.fitness.get("accuracy") else 0) + self.llm.generations + 1
        if items:
            works.append(judging.items(self.pruned, items * looked))
            tokens += items * looked * judging.ITEM_TOKENS
        if self.config.pruning.statistics == "sequential":
            again = (*self._calibration(self.dense), *self._rankings(), self._rerun())
            works += [_times(work, count) for work in again]
            tokens += count * 2 * self._calibration_tokens
        return Stage("search", tuple(works), self.memory.score(), tokens)

    def ask(self) -> Stage:
        """Return the LLM's part of the search."""
        if not self.llm.calls:
            return Stage("ask the LLM", (), Memory())
        return Stage(
            "ask the LLM",
            tuple(self._answers(self.config.driver)),
            self.memory.score(),
            llm_tokens=self.llm.tokens,
            llm_cost=self.llm.cost,
        )

    def front(self) -> Stage:
        """Return the searches for further budgets."""
        targets = set(self.config.front.targets) - {self.config.budget.target}
        count = round(self.config.front.effort * self.evaluations) * len(targets)
        select = self._select_tokens * self.config.search.finalists * len(targets)
        if not targets:
            return Stage("front", (), Memory())
        works = [*self._scores(count, self._search_tokens), *self._cuts(count, self._search_tokens)]
        works += self._scores(1, select)
        return Stage(
            "front", tuple(works), self.memory.score(), count * self._search_tokens + select
        )

    def select(self) -> Stage:
        """Return the finalists on fresh tokens, and what the refit is judged by there."""
        fresh = self._select_tokens
        scored = min(self.config.search.finalists, self.evaluations)
        scored += 2 * self.models if self.config.pruning.refit else 0
        works = [*self._references(fresh), *self._scores(scored, fresh)]
        return Stage("select", tuple(works), self.memory.score(), scored * fresh)

    def refit(self) -> Stage:
        """Return the refit of the found plan and of its controls, in one pass over the dense model.

        A refitted layer runs once and its output projections a second time.
        """
        if not self.config.pruning.refit:
            return Stage("refit", (), Memory())
        tokens = self._calibration_tokens
        works = [
            self._blocks(self.dense, tokens),
            *(_times(self._blocks(self.pruned, tokens), 4 / 3) for _ in range(self.models)),
            *surgery.refit(self._shapes, [self.kept] * self.models, tokens),
        ]
        read = (1 + self.models) * tokens
        return Stage("refit", tuple(works), self.memory.refit(), read)

    def controls(self) -> Stage:
        """Return the perplexities of the controls."""
        works = (self.models - 1) * self._perplexities(self.pruned)
        tokens = (self.models - 1) * self._reported
        return Stage("controls", tuple(works), self.memory.controls(), tokens)

    def export(self) -> Stage:
        """Return writing the pruned model, and reading it back to compare it bit for bit."""
        written = self.export_bytes
        return Stage("export", (Work(disk=2 * written),), self.memory.export())

    def perplexity(self) -> Stage:
        """Return the perplexities of both models."""
        works = self._perplexities(self.dense) + self._perplexities(self.pruned)
        return Stage("perplexity", tuple(works), self.memory.judge(), 2 * self._reported)

    def tasks(self) -> Stage:
        """Return the commonsense tasks of both models."""
        settings = self.config.evaluation
        if not settings.tasks:
            return Stage("tasks", (), Memory())
        works = tuple(judging.tasks(model, settings) for model in (self.dense, self.pruned))
        return Stage("tasks", works, self.memory.judge(), 2 * judging.task_tokens(settings)[0])

    def speed(self) -> Stage:
        """Return timing of both models and the continuations in the report."""
        settings, works = self.config.evaluation, list[Work]()
        for model in (self.dense, self.pruned):
            works += judging.timing(model, settings)
            works.append(model.steps(_SAMPLE_TOKENS, _SAMPLES))
        asked = settings.speed
        rows = (asked.repeats + 2) * asked.batch * (asked.prompt_tokens + asked.new_tokens)
        tokens = 2 * (rows + _SAMPLES * _SAMPLE_TOKENS)
        return Stage("speed", tuple(works), self.memory.judge(), tokens)

    @property
    def dense(self) -> Running:
        """The dense model."""
        return Running(self.architecture, self.precision)

    @property
    def pruned(self) -> Running:
        """A model within the budget."""
        return Running(self.architecture, self.precision, self.kept)

    @property
    def models(self) -> int:
        """Models that are finished: the found plan and its controls."""
        return 1 + len(self.config.evaluation.controls)

    @property
    def memory(self) -> MemoryModel:
        """What the stages hold."""
        return MemoryModel(self.config, self.dense, self.pruned, self.models)

    @property
    def evaluations(self) -> int:
        """Full evaluations; an allocator of one fixed plan makes one."""
        search = self.config.search
        searches = search.allocator in ("llm", "hybrid", *get_args(Operators))
        return search.evaluations if searches else 1

    @property
    def export_bytes(self) -> float:
        """Bytes of the exported weights, correction biases included."""
        has_biases = self.config.pruning.reconstruction != "none"
        fixed = self.architecture.fixed_parameters(correction_biases=has_biases)
        width = 4 if self.config.export.dtype == "float32" else 2
        return width * (self.kept * self.architecture.block_parameters() + fixed)

    @property
    def _shapes(self) -> surgery.Shapes:
        return surgery.Shapes.of(self.architecture)

    @property
    def _rows(self) -> int:
        return self.config.evaluation.batch_size

    @property
    def _calibration_tokens(self) -> int:
        return self._whole(self.config.data.calibrate.tokens)

    @property
    def _search_tokens(self) -> int:
        return self._whole(self.config.data.search.tokens)

    @property
    def _select_tokens(self) -> int:
        return self._whole(self.config.data.select.tokens)

    @property
    def _reported(self) -> int:
        return sum(tokens for tokens, _ in judging.reported_tokens(self.config.data))

    def _whole(self, tokens: int) -> int:
        length = self.config.data.length
        return tokens // length * length

    def _blocks(self, model: Running, tokens: int) -> Work:
        """Return a pass through the layers alone."""
        return model.passes(tokens, self.config.data.length, self._rows)

    def _calibration(self, model: Running) -> tuple[Work, ...]:
        tokens = self._calibration_tokens
        return self._blocks(model, tokens), surgery.gram(self._shapes, tokens)

    def _rankings(self) -> tuple[Work, ...]:
        return surgery.ranking(self._shapes, self.config.pruning)

    def _rerun(self) -> Work:
        return self._blocks(self.pruned, self._calibration_tokens)

    def _perplexities(self, model: Running) -> list[Work]:
        return judging.perplexities(model, self.config.data, self._rows)

    @property
    def _terms(self) -> list[str]:
        return [name for name in TEXT_TERMS if self.config.fitness.get(name)]

    def _references(self, tokens: int) -> list[Work]:
        """Return what the dense model predicts, once: its own pass, then two with the head."""
        length = self.config.data.length
        return [
            self.dense.passes(tokens, length, 1, head=2 * tokens)
            for name in self._terms
            if name != "perplexity"
        ]

    def _scores(self, count: int, tokens: int) -> list[Work]:
        """Return `count` plans on `tokens` tokens each, every text term meeting the head."""
        if not self._terms:
            return []
        head = len(self._terms) * tokens
        one = self.pruned.passes(tokens, self.config.data.length, self._rows, head=head)
        return [_times(one, count)]

    def _cuts(self, count: int, tokens: int) -> list[Work]:
        """Return the triangular solves of least-squares cuts.

        Where the cuts of one plan fit the cache, a level is solved once; where they do not, every
        cut of a plan is solved anew for every micro-batch.
        """
        settings = self.config.pruning
        if settings.reconstruction != "least_squares" or settings.statistics == "sequential":
            return []
        width = BYTES[self.precision]
        held = self._shapes.over_layers(lambda o, n: width * o * n, self.kept)
        if held <= CACHE_BYTES:
            made = min(count, math.ceil(self.architecture.mlp / settings.step))
        else:
            made = count * self._micro_batches(tokens // self.config.data.length)
        return [surgery.cuts(self._shapes, self.kept, made)]

    def _micro_batches(self, sequences: int) -> int:
        """Return the micro-batches of one full evaluation, round by round where plans race."""
        racing = self.config.search.racing
        ends = [sequences] if racing.is_off else [math.ceil(x * sequences) for x in racing.rounds]
        starts = [0, *ends[:-1]]
        return sum(math.ceil((b - a) / self._rows) for a, b in zip(starts, ends, strict=True))

    def _answers(self, driver: Endpoint) -> Sequence[Work]:
        """Return the time of the LLM by its kind."""
        brood = max(self.config.search.crossover, self.config.search.mutate, 1)
        rows = max(1, min(driver.batch, brood, self.llm.calls))
        waves = math.ceil(self.llm.calls / rows)
        reply = self.llm.reply_tokens / self.llm.calls
        if driver.kind == "replay":
            return [Work()]
        if driver.kind == "api":
            return [Work(waiting=waves * (_API_LATENCY + reply / _API_TOKENS_A_SECOND))]
        model = self._driver(driver)
        prompt = max(1, self.llm.prompt_tokens // self.llm.calls)
        read = model.passes(self.llm.prompt_tokens, prompt, rows)
        if driver.kind == "vllm":
            written = replace(model.steps(waves * reply, rows), layers=0)
            return [Work(waiting=_SERVER_SECONDS), read, written]
        return [read, model.steps(_ASKED_TOKENS * waves * reply, rows)]

    def _driver(self, driver: Endpoint) -> Running:
        """Return the driver's model; one of which nothing is known counts as the pruned one."""
        if driver.model is None:
            return self.dense
        try:
            return Running(architecture_by_name(driver.model), self.precision)
        except ValueError:
            return self.dense


def _times(work: Work, count: float) -> Work:
    """Return the same work `count` times over."""
    return replace(
        work,
        flops=count * work.flops,
        bytes=count * work.bytes,
        layers=count * work.layers,
        disk=count * work.disk,
        waiting=count * work.waiting,
    )
