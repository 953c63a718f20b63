"""The stages of a run: what each computes, holds and reads, in the order of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pruning.architecture import Architecture
from pruning.plan import Grid
from selfpruner.config import RunConfig
from selfpruner.costs import judging, surgery
from selfpruner.costs.answering import answering
from selfpruner.costs.hardware import Hardware, Precision
from selfpruner.costs.llm import Asking, num_generations, slopes_charge
from selfpruner.costs.memory import Memory, MemoryModel
from selfpruner.costs.scoring import Scoring
from selfpruner.costs.timing import latency_table
from selfpruner.costs.work import Running, Work, times

_SPEED_RUNS = 4 * 6  # forward passes of the speed model: four plans, six rounds
_SAMPLES, _SAMPLE_TOKENS = 4, 32  # continuations that the report shows


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
        grid: the allowed plans.
        precision: of forward passes.
        kept: share of the blocks that the budget leaves, above 0 to 1.
        llm: what the search will ask.
        hardware: that it runs on.
        workers: processes that score the plans of its searches, each on a device of its own.
    """

    config: RunConfig
    architecture: Architecture
    grid: Grid
    precision: Precision
    kept: float
    llm: Asking
    hardware: Hardware
    workers: int = 1

    def all(self) -> list[Stage]:
        """Return the stages in order, empty ones left out."""
        stages = [
            self.load(),
            self.latency(),
            self.curvature(),
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
        work = Work(disk=self.dense.weight_bytes, waiting=self.hardware.start_seconds)
        return Stage("load", (work,), self.memory.load())

    def latency(self) -> Stage:
        """Return the latency table, where the search depends on predicted times."""
        if not self.config.weighs_latency:
            return Stage("latency table", (), Memory())
        works = latency_table(self.config, self.dense, self.grid, self.hardware)
        return Stage("latency table", works, self.memory.table())

    def curvature(self) -> Stage:
        """Return the way through the dense model and back, where units are measured by that."""
        tokens = self.memory.fisher_tokens
        if not tokens:
            return Stage("curvature", (), Memory())
        works = (*self._curvature(), *self._read(2 * self.dense.weight_bytes + self.memory.fisher))
        return Stage("curvature", works, self.memory.curvature(), tokens)

    def calibrate(self) -> Stage:
        """Return the dense pass over the calibration tokens with its Gram matrices."""
        works = (*self._calibration(self.dense), *self._read(self.memory.cuts))
        return Stage("calibrate", works, self.memory.calibrate(), self._calibration_tokens)

    def rank(self) -> Stage:
        """Return ranking, corrections and the timing of the speed model."""
        length, works = self.config.data.length, list(self._rankings())
        timed = 0 if self.config.weighs_latency else _SPEED_RUNS * length
        works += [replace(self.dense, kept=0.5).passes(timed, length, 1)] if timed else []
        return Stage("rank, correct", tuple(works), self.memory.calibrate(), timed)

    def search(self) -> Stage:
        """Return scoring: evaluations of all search tokens or of a window, cuts, items."""
        count = self.evaluations
        tokens = count * self._scored_tokens
        works = [
            *self._opened(),
            *self.scoring.references(self._search_tokens),
            *self._sloping_and_shared(self.scoring.scores(count, self._scored_tokens), count),
            *self._shared(self.scoring.cuts(count)),
        ]
        works += self._read(self._walks(count) * self.memory.cuts + self.dense.weight_bytes)
        items = self.config.data.choices
        looked = (count if self.config.fitness.get("accuracy") else 0) + self.llm.generations + 1
        if items:
            works.append(judging.items(self.pruned, items * looked))
            tokens += items * looked * judging.ITEM_TOKENS
        works += self._shared(self._ranked_anew(count))
        tokens += self._ranking_tokens(count)
        return Stage("search", tuple(works), self.memory.search(), tokens)

    def ask(self) -> Stage:
        """Return the LLM's part of the search."""
        if not self.llm.calls:
            return Stage("ask the LLM", (), Memory())
        return Stage(
            "ask the LLM",
            answering(self.config, self.llm, self.dense),
            self.memory.search(),
            llm_tokens=self.llm.tokens,
            llm_cost=self.llm.cost,
        )

    def front(self) -> Stage:
        """Return the searches for further budgets."""
        targets = set(self.config.front.targets) - {self.config.budget.target, 1.0}
        each = max(1, round(self.config.front.effort * self.evaluations))
        count = each * len(targets)
        select = self._select_tokens * self._finalists * len(targets)
        if not targets:
            return Stage("front", (), Memory())
        works = [
            *self._sloping_and_shared(self.scoring.scores(count, self._scored_tokens), each),
            *self._shared(self.scoring.cuts(count)),
        ]
        works += self.scoring.scores(1, select)
        finalists = self._finalists * len(targets)
        works += [*self._shared(self._ranked_anew(count)), *self._ranked_anew(finalists)]
        works += self._read(len(targets) * (self._walks(each) + 1) * self.memory.cuts)
        tokens = count * self._scored_tokens + select + self._ranking_tokens(count + finalists)
        return Stage("front", tuple(works), self.memory.score(), tokens)

    def select(self) -> Stage:
        """Return the finalists on fresh tokens, and what the refit is judged by there."""
        fresh = self._select_tokens
        scored = self._finalists
        scored += 2 * self.models if self.config.pruning.refit else 0
        works = [*self.scoring.references(fresh), *self.scoring.scores(scored, fresh)]
        works += self._ranked_anew(self._finalists)
        works += self._read(self.memory.cuts + self.dense.weight_bytes + self.memory.finished)
        tokens = scored * fresh + self._ranking_tokens(self._finalists)
        return Stage("select", tuple(works), self.memory.score(), tokens)

    def refit(self) -> Stage:
        """Return the refit of the found plan and of its controls, in one pass over the dense model.

        A refitted layer runs once and its output projections a second time.
        """
        if not self.config.pruning.refit:
            return Stage("refit", (), Memory())
        tokens = self._calibration_tokens
        works = [
            self._blocks(self.dense, tokens),
            *(times(self._blocks(self.pruned, tokens), 4 / 3) for _ in range(self.models)),
            *surgery.refit(self._shapes, [self.kept] * self.models, tokens),
            *self._read(self.dense.weight_bytes + 3 * self.models * self.pruned.weight_bytes),
        ]
        read = (1 + self.models) * tokens
        return Stage("refit", tuple(works), self.memory.refit(), read)

    def controls(self) -> Stage:
        """Return the perplexities of the controls, and what ranks their units anew."""
        count = self.models - 1
        works = [*self._ranked_anew(count), *(count * self._perplexities(self.pruned))]
        tokens = count * self._reported + self._ranking_tokens(count)
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
        """Return the commonsense tasks of both models; a streamed run opens one after the other."""
        settings = self.config.evaluation
        if not settings.tasks:
            return Stage("tasks", (), Memory())
        models, tokens = (self.dense, self.pruned), 2 * judging.task_tokens(settings)[0]
        works = [judging.tasks(model, settings) for model in models]
        if not self.memory.is_streamed:
            return Stage("tasks", tuple(works), self.memory.judge(), tokens)
        room = judging.SPREAD_SHARE * self.hardware.usable_bytes
        devices = self.hardware.devices
        works += [judging.spread(model, settings, devices * room) for model in models]
        return Stage("tasks", tuple(works), self.memory.spread(room, devices), tokens)

    def speed(self) -> Stage:
        """Return timing of both models and the continuations in the report."""
        settings, works = self.config.judged, list[Work]()
        if self.memory.is_streamed:
            return Stage("speed", (), Memory())
        for model in (self.dense, self.pruned):
            works += judging.timing(model, settings)
            works.append(model.steps(_SAMPLE_TOKENS, _SAMPLES))
        asked = settings.speed
        rows = (asked.repeats + 2) * asked.batch * (asked.prompt_tokens + asked.new_tokens)
        tokens = 2 * (rows + _SAMPLES * _SAMPLE_TOKENS)
        return Stage("speed", tuple(works), self.memory.timed(settings.speed), tokens)

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
    def scoring(self) -> Scoring:
        """What scoring plans computes."""
        aligned = self.config.alignment(on_gpu=self.hardware.gpu)
        step = self.config.pruning.step or aligned.step
        return Scoring(self.config, self.dense, self.pruned, self.memory.caches_plans, step)

    @property
    def memory(self) -> MemoryModel:
        """What the stages hold."""
        return MemoryModel(self.config, self.dense, self.pruned, self.models)

    @property
    def evaluations(self) -> int:
        """Full evaluations; an allocator of one fixed plan makes one."""
        search = self.config.search
        return search.evaluations if search.searches else 1

    @property
    def _finalists(self) -> int:
        """Plans of a search that are scored on fresh tokens: the best ones and the first."""
        return min(self.config.search.finalists + 1, self.evaluations)

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
    def _scored_tokens(self) -> int:
        """Tokens of one evaluation."""
        window = self.config.search.window
        all_of_them = self._search_tokens
        return all_of_them if window is None else min(all_of_them, window * self._length)

    @property
    def _length(self) -> int:
        return self.config.data.length

    @property
    def _select_tokens(self) -> int:
        return self._whole(self.config.data.select.tokens)

    @property
    def _reported(self) -> int:
        return sum(tokens for tokens, _ in judging.reported_tokens(self.config.data))

    def _walks(self, count: int) -> int:
        """Return how often plans go through all layers: once a generation and round of a race.

        Slopes go up through them and back.
        """
        racing, slopes = self.config.search.racing, slopes_charge(self.config)
        rounds = 1 if racing.is_off else len(racing.rounds)
        return (1 + num_generations(self.config, count)) * (rounds + 2 * bool(slopes))

    def _sloping_and_shared(self, works: Sequence[Work], count: int) -> list[Work]:
        """Return the part of the works that is slopes, and what workers share of the others.

        `count`: full evaluations of one search.
        """
        slopes = slopes_charge(self.config) * (1 + num_generations(self.config, count))
        share = min(slopes / count, 1.0)
        scored = self._shared([times(work, 1 - share) for work in works])
        return [*(times(work, share) for work in works if share), *scored]

    def _shared(self, works: Sequence[Work]) -> list[Work]:
        """Return what is left of the works where the workers share them out."""
        return [times(work, 1 / self.workers) for work in works]

    def _opened(self) -> tuple[Work, ...]:
        """Return the workers' start, at once: in memory each loads the model and ranks it."""
        if self.workers == 1 or self.memory.is_streamed:
            return ()
        measured = (*self._curvature(), *self._calibration(self.dense))
        return (*self.load().works, *measured, *self._rankings())

    def _read(self, size: float) -> tuple[Work, ...]:
        """Return bytes that a streamed run reads from disk or writes there."""
        return (Work(disk=size),) if self.memory.is_streamed else ()

    def _whole(self, tokens: int) -> int:
        length = self.config.data.length
        return tokens // length * length

    def _blocks(self, model: Running, tokens: int) -> Work:
        """Return a pass through the layers alone."""
        return model.passes(tokens, self.config.data.length, self._rows)

    def _curvature(self) -> tuple[Work, ...]:
        """Return the passes: up, and on the way down each layer once more and back through it."""
        tokens, length = self.memory.fisher_tokens, self._length
        if not tokens:
            return ()
        passes = self.dense.passes(3 * tokens, length, self._rows, head=2 * tokens)
        return passes, *surgery.curvature(self._shapes, tokens)

    def _calibration(self, model: Running) -> tuple[Work, ...]:
        tokens = self._calibration_tokens
        return self._blocks(model, tokens), surgery.gram(self._shapes, tokens)

    def _rankings(self) -> tuple[Work, ...]:
        return surgery.ranking(self._shapes, self.config.pruning)

    def _ranked_anew(self, plans: int) -> list[Work]:
        """Return what ranks units on what the pruned layers below a plan's put out, for each."""
        if self.config.pruning.statistics != "sequential":
            return []
        rerun = self._blocks(self.pruned, self._calibration_tokens)
        works = (*self._calibration(self.dense), *self._rankings(), rerun)
        return [times(work, plans) for work in works]

    def _ranking_tokens(self, plans: int) -> int:
        is_anew = self.config.pruning.statistics == "sequential"
        return 2 * plans * self._calibration_tokens if is_anew else 0

    def _perplexities(self, model: Running) -> list[Work]:
        return judging.perplexities(model, self.config.data, self._rows)
