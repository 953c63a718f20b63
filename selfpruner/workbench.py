"""The workbench: model, text, grid and budget of one run, loaded in the order of what may fail."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from agent import allocators
from agent.projection import Space
from pruning import elastic
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.calibration import grown_calibration
from pruning.curvature import LayerCurvature, stream_curvature
from pruning.elastic import ElasticModel, Prunable
from pruning.elastic_layer import Recipe
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.families import Family, check_window, family_of
from pruning.loading import architecture_of, load, load_streamed
from pruning.plan import Grid, Plan
from pruning.sequential import SequentialModel
from pruning.spool import Spool
from selfpruner.config import RunConfig
from selfpruner.data import TextData, load_texts
from selfpruner.heap import settle_heap
from selfpruner.latency_table import Detail, LatencyTable
from selfpruner.profiling import known_table, stored_table
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The model that runs as any plan, and the cut errors `[layer][block][level]`.
Ranked = tuple[Prunable, allocators.Sensitivity]


@dataclass(frozen=True)
class Workbench:
    """What every later stage of a run works on.

    `table` is there where a speedup is the budget or latency is part of the fitness: the grid then
    has no level that is predicted to take as long as a wider one. `scratch` is the folder of
    everything that is streamed, None where all is in memory.
    """

    config: RunConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    architecture: Architecture
    grid: Grid
    budget: Budget
    texts: TextData
    table: LatencyTable | None = None
    scratch: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """How units are ranked and corrected."""
        settings = self.config.pruning
        return Recipe(
            settings.metric,
            settings.reconstruction,
            settings.ridge,
            settings.attention_unit,
            self.config.seed,
            settings.attention_metric,
        )

    @property
    def space(self) -> Space:
        """The plans that the search may visit."""
        search = self.config.search
        return Space(self.grid, self.budget, search.min_rate, search.max_rate)

    def proposing(self, config: RunConfig) -> Self:
        """Return this bench for other settings of the search, the driver or the budget."""
        budget = budget_of(config, self.architecture, self.grid, self.table)
        return replace(self, config=config, budget=budget)

    def within(self, budget: Budget) -> Self:
        """Return this bench for another budget on the same grid."""
        return replace(self, budget=budget)

    def achieved(self, plan: Plan) -> float:
        """Return what `plan` comes to in the unit of the budget's target."""
        return self.budget.achieved(self.grid.levels(plan))


def prepare(config: RunConfig, progress: Progress, folder: RunFolder | None = None) -> Workbench:
    """Return the loaded workbench.

    The configuration, the family and the budget are checked before any weight is loaded; a budget
    of time needs the model. A run in `folder` that was begun keeps the latency table it began with;
    what is streamed goes there, too.

    Raises:
        ValueError: what is asked for cannot be had; one line.
    """
    scratch = _scratch(config, folder)
    with progress.stage("load"):
        architecture = architecture_of(config.model, trust_remote_code=config.trust_remote_code)
        grid = grid_of(config, architecture)
        if config.budget.kind != "speedup":
            _check_front(config, budget_of(config, architecture, grid))
        model, tokenizer = (load if scratch is None else load_streamed)(
            config.model,
            resolved_dtype(config),
            usable_device(config),
            trust_remote_code=config.trust_remote_code,
        )
        family, architecture = family_of(model)
        check_window(model, config.data.length, "data.length")
        if scratch is not None:  # judged layer by layer, too
            for index, text in enumerate(config.data.report):
                check_window(model, text.length, f"data.report.{index}.length")
        texts = load_texts(config, tokenizer)
    table = None
    if config.weighs_latency:
        detail = Detail.fine(on_gpu=model.device.type == "cuda")
        table = stored_table(folder) or known_table(model, grid, config.workload, detail, progress)
        grid = table.worthwhile(grid)
    budget = budget_of(config, architecture, grid, table)
    _check_front(config, budget)
    return Workbench(
        config, model, tokenizer, family, architecture, grid, budget, texts, table, scratch
    )


def _check_front(config: RunConfig, budget: Budget) -> None:
    """Refuse budgets of the front that no plan is within.

    Raises:
        ValueError: one line.
    """
    for target in config.front.targets:
        try:
            budget.at(target)
        except ValueError as error:
            raise ValueError(f"front.targets: got {target:g}: {error}") from None


def _scratch(config: RunConfig, folder: RunFolder | None) -> Path | None:
    """Return the folder for what is streamed, empty; None where nothing is.

    Raises:
        ValueError: there is no place for it.
    """
    if config.memory == "whole":
        return None
    if folder is None:
        raise ValueError("memory: got 'streamed'; allowed for this command: whole")
    shutil.rmtree(folder.scratch, ignore_errors=True)
    return folder.scratch


def grid_of(config: RunConfig, architecture: Architecture) -> Grid:
    """Return the widths that suit what is to run the pruned model.

    Raises:
        ValueError: the model or `pruning.step` does not suit it; one line.
    """
    settings = config.pruning
    return config.alignment(on_gpu=resolved_device(config) == "cuda").grid(
        architecture, settings.step, settings.attention_unit, settings.prune_attention
    )


def budget_of(
    config: RunConfig, architecture: Architecture, grid: Grid, table: LatencyTable | None = None
) -> Budget:
    """Return what a plan may cost.

    Raises:
        ValueError: no plan is within it, or its time was not measured; one line.
    """
    asked = config.budget
    if asked.kind == "speedup":
        if table is None or table.workload != asked.workload:
            raise ValueError(f"budget.speedup: {asked.workload} was not measured for this model")
        return Budget.timed(table.times(grid), architecture.layers, asked.target)
    is_memory = asked.kind == "memory"
    dtype: torch.dtype = (
        getattr(torch, config.export.dtype) if is_memory else resolved_dtype(config)
    )
    return Budget.of(
        architecture,
        grid,
        asked.kind,
        asked.target,
        correction_biases=config.pruning.reconstruction != "none",
        tokens=config.data.length,
        cached_tokens=asked.cached_tokens,
        bytes_per_weight=dtype.itemsize,
    )


def rank(bench: Workbench, progress: Progress) -> Ranked:
    """Return the model that runs as any plan, and the cut errors `[layer][block][level]`."""
    curvature = _curvature(bench, progress)
    ranked = _ranked(bench, curvature, progress)
    measures = curvature or repeat(None, len(ranked.layers))
    errors = []
    with progress.stage("cut errors", len(ranked.layers)) as advance:
        for layer, measure in zip(ranked.layers, measures, strict=True):
            errors.append(layer.cut_errors(bench.grid, measure))
            advance()
    if bench.config.pruning.statistics == "frozen":
        return ranked, errors
    sequential = SequentialModel(
        bench.model,
        bench.family,
        bench.architecture,
        bench.texts.calibrate,
        bench.recipe,
        batch_size=bench.config.evaluation.batch_size,
        curvature=curvature,
    )
    return sequential, errors


def lend_ranking(ranked: Ranked, path: Path) -> None:
    """Write down a streamed run's ranking for its other processes; its cuts stay in their spool.

    Raises:
        OSError: the file cannot be written.
    """
    prunable, errors = ranked
    assert isinstance(prunable, ElasticModel)
    torch.save((prunable.layers, errors), path)


def lent_ranking(bench: Workbench, path: Path) -> Ranked:
    """Return what `rank` did in the process that lends its ranking, for the same model here.

    Raises:
        ValueError: there is no such file, as on a node that does not share the run's folder.
    """
    if not path.is_file():
        raise ValueError(f"--workers: no {path} here; a streamed run's workers share its folder")
    layers, errors = torch.load(path, weights_only=False)  # a pickle, of this very run
    ranked = ElasticModel(bench.model, bench.family, layers)
    return LayerwiseElastic(ranked, bench.config.evaluation.batch_size), errors


def _curvature(bench: Workbench, progress: Progress) -> list[LayerCurvature] | None:
    """Return the curvature of the dense model by its first calibration tokens; None without."""
    wanted = bench.config.pruning.fisher_tokens
    if not wanted:
        return None
    rows = max(1, wanted // bench.config.data.length)
    with progress.stage("curvature", 2 * bench.architecture.layers) as advance:
        return stream_curvature(
            bench.model,
            bench.family,
            bench.texts.calibrate[:rows],
            batch_size=bench.config.evaluation.batch_size,
            seed=bench.config.seed,
            spool=None if bench.scratch is None else Spool(bench.scratch / "curvature"),
            on_layer=advance,
        )


def _ranked(
    bench: Workbench, curvature: list[LayerCurvature] | None, progress: Progress
) -> ElasticModel:
    tokens: Tensor = bench.texts.calibrate
    batch_size = bench.config.evaluation.batch_size
    dense = (bench.model, bench.family, bench.architecture)
    with progress.stage("calibrate", bench.architecture.layers) as advance:
        if bench.config.pruning.calibration == "auto":
            unit = bench.recipe.unit
            grown = grown_calibration(*dense, tokens, unit, batch_size=batch_size)
            ranked = ElasticModel.of(
                *dense,
                grown.statistics,
                bench.recipe,
                curvature=curvature,
                on_layer=lambda _: advance(),
            )
        else:
            ranked = ElasticModel.rank(
                *dense,
                tokens,
                bench.recipe,
                batch_size=batch_size,
                curvature=curvature,
                spool=None if bench.scratch is None else Spool(bench.scratch / "cuts"),
                on_layer=lambda _: advance(),
            )
    return LayerwiseElastic(ranked, batch_size) if _goes_layer_by_layer(bench) else ranked


def _goes_layer_by_layer(bench: Workbench) -> bool:
    """Return whether plans go through the layers together.

    They do where layers are read from disk, and where cuts take solving and those of one plan are
    more than is kept for later: each would push out the others, micro-batch by micro-batch.
    """
    if bench.scratch is not None:
        return True
    model, plan = bench.architecture, bench.grid.plan(allocators.uniform(bench.space))
    columns = sum(
        x.kv_groups * x.q_per_group * model.head_dim + x.mlp_channels for x in plan.layers
    )
    cuts = columns * model.hidden * bench.model.dtype.itemsize
    return bench.recipe.reconstruction == "least_squares" and cuts > elastic.CACHE_BYTES


def settle_process(*, streaming: bool = False) -> None:
    """Settle the heap, and turn off the bars of transformers and what accelerate says of weights.

    The command shows and says its own. `streaming`: layers are read from disk as they are needed.
    """
    from transformers.utils.logging import disable_progress_bar

    settle_heap(streaming=streaming)
    disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def resolved_device(config: RunConfig) -> str:
    """Return the device; `auto` takes a GPU where there is one."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(config: RunConfig) -> str:
    """Return the device that a model is to be loaded on in this process.

    Raises:
        ValueError: a GPU is asked for and torch finds none here.
    """
    device = resolved_device(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got cuda; torch {torch.__version__} finds no GPU here")
    return device


def resolved_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of forward passes; `auto` takes bfloat16 where it is fast."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if resolved_device(config) == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
