"""The pipeline: one command from a pretrained model to a smaller one with a report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from agent.candidate import Candidate
from agent.graph import SearchResult
from evaluators.tasks import task_texts
from pruning.elastic import Prunable
from pruning.export import export, is_stock
from pruning.plan import Plan
from pruning.ranking import order_hash
from pruning.shards import save
from pruning.streaming import reopened
from selfpruner.config import RunConfig
from selfpruner.costs.hardware import Precision
from selfpruner.costs.memory import MemoryModel
from selfpruner.costs.work import Running
from selfpruner.data import load_choice_items
from selfpruner.finishing import (
    best_on_fresh_tokens,
    control_plans,
    finish,
    judged_controls,
)
from selfpruner.fitness import Fitness
from selfpruner.front import front
from selfpruner.model_card import model_card
from selfpruner.overlap import check_items
from selfpruner.progress import Progress
from selfpruner.report import write_report
from selfpruner.resident import opened_arena
from selfpruner.results import FrontPoint
from selfpruner.run_folder import RunFolder
from selfpruner.searching import check_words_and_drivers, search
from selfpruner.verdict import Outcome, verdict
from selfpruner.workbench import Workbench, prepare, settle_process
from selfpruner.workforce import Workforce

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOUND = "found"


@dataclass(frozen=True)
class _Choice:
    """The plan that becomes the model, and what it is finished with.

    Attributes:
        bench: within the budget of the plan.
        prunable: the ranked model.
        selection: the fitness on fresh tokens.
        found: the search.
        selected: its plan, or that of the front.
        fitness: its fitness on fresh tokens.
        points: of the front, none where no further budgets were asked for.
    """

    bench: Workbench
    prunable: Prunable
    selection: Fitness
    found: SearchResult
    selected: Candidate
    fitness: float
    points: tuple[FrontPoint, ...] = ()


def compress(
    config: RunConfig, folder: RunFolder, progress: Progress, workforce: Workforce | None = None
) -> Path:
    """Run every stage and return the path of the report; a search begun in `folder` goes on.

    The plans of the search are scored by `workforce`, None for this process alone.

    Raises:
        ValueError: what is asked for cannot be had; one line.
        OSError: the run folder cannot be written.
        DriverError: all drivers of the search gave up.
        KeyboardInterrupt: a signal stopped it; the search stops between two steps.
    """
    settle_process(streaming=config.memory == "streamed")
    torch.manual_seed(config.seed)
    check_words_and_drivers(config)
    bench = prepare(config, progress, folder)
    _check_items(config)
    _check_disk(bench, folder)
    folder.keep()
    choice = _choose(bench, folder, progress, workforce or Workforce())
    bench = choice.bench
    _write_plan(bench, choice.prunable, choice.selected.plan, folder)
    model, outcome = _finish(choice, progress)
    del choice  # what ranked and scored the plans: the export needs its room
    with progress.stage("export"):
        pruned = export(model, bench.tokenizer, folder.model, getattr(torch, config.export.dtype))
        del model
        pruned = _checked(pruned, folder.model, bench)
    shutil.rmtree(folder.scratch, ignore_errors=True)  # the judges may need its room
    results = verdict(bench, pruned, outcome, folder, progress)
    card = model_card(results, is_stock(pruned))
    (folder.model / "README.md").write_text(card, encoding="utf-8")
    results.save(folder.results)  # last: with it, a resumed run has but the report to write
    return write_report(folder.path)


def _choose(
    bench: Workbench, folder: RunFolder, progress: Progress, workforce: Workforce
) -> _Choice:
    """Search, also for the budgets of a front, and take the plan that becomes the model."""
    config = bench.config
    with opened_arena(bench, folder, progress, workforce) as arena:
        found = search(arena, config, folder, progress)
        with progress.stage("fresh tokens"):
            best = best_on_fresh_tokens(found, arena.selection)
        choice = _Choice(bench, arena.prunable, arena.selection, found, *best)
        if not config.front.targets:
            return choice
        made = front(arena, found, best, folder, progress)
        stop = made.picked(config.front.pick, config.budget.target)
        return replace(
            choice,
            bench=bench.within(stop.arena.bench.budget),
            selected=stop.selected,
            fitness=stop.fitness,
            points=made.points,
        )


def _finish(choice: _Choice, progress: Progress) -> tuple[PreTrainedModel, Outcome]:
    """Return the model of the chosen plan, and what came of it and of the controls."""
    bench = choice.bench
    plans, warnings = control_plans(bench)
    asked = bench.config.budget.target
    if bench.budget.target != asked:
        warnings += (
            f"front.pick {bench.config.front.pick}: the model is the front's at "
            f"{bench.budget.kind} {bench.budget.target:g}; the search told of is that of {asked:g}",
        )
    plans = {_FOUND: choice.selected.plan, **plans}
    finished = finish(bench, choice.prunable, plans, choice.selection, progress)
    model, refitted = finished.pop(_FOUND)
    outcome = Outcome(
        selected=choice.selected,
        found=choice.found,
        selection_fitness=choice.fitness,
        refit=refitted,
        controls=judged_controls(bench, finished, progress),
        warnings=warnings,
        front=choice.points,
    )
    return model, outcome


def _check_disk(bench: Workbench, folder: RunFolder) -> None:
    """Refuse a disk without room for the exported model, before anything is computed.

    Raises:
        ValueError: less is free than the largest model of the budget would take.
    """
    dtype: torch.dtype = getattr(torch, bench.config.export.dtype)
    kind, cached = bench.budget.kind, bench.config.budget.cached_tokens
    counts_weights = kind in ("parameters", "bytes") or (kind == "memory" and not cached)
    share = bench.budget.limit / bench.budget.dense if counts_weights else 1.0
    weights = min(share, 1.0) * bench.architecture.block_parameters()
    needed = (weights + bench.architecture.fixed_parameters(True)) * dtype.itemsize
    if bench.scratch is not None:
        needed += _scratch_bytes(bench, min(share, 1.0))
    free = shutil.disk_usage(folder.path).free + folder.replaced_bytes
    if free < needed:
        needs = "the pruned model needs" if bench.scratch is None else "a streamed run needs"
        raise ValueError(f"{folder}: {free / 1e6:.0f} MB are free, {needs} {needed / 1e6:.0f} MB")


def _scratch_bytes(bench: Workbench, kept: float) -> float:
    """Return what the run will keep on disk instead of in memory."""
    precision: Precision = "float32" if bench.model.dtype.itemsize == 4 else "bfloat16"
    dense = Running(bench.architecture, precision)
    models = 1 + len(bench.config.evaluation.controls)
    return MemoryModel(bench.config, dense, replace(dense, kept=kept), models).scratch()


def _check_items(config: RunConfig) -> None:
    """Refuse to search on items that are reported later.

    Raises:
        ValueError: one is; one line.
    """
    if config.data.choices and config.evaluation.tasks:
        items = load_choice_items(config.data.choices, config.seed, config.data.root)
        check_items(items, task_texts(config.evaluation.tasks))


def _write_plan(bench: Workbench, prunable: Prunable, plan: Plan, folder: RunFolder) -> None:
    """Write plan.json and the ranking it is to be read with.

    Raises:
        OSError: they cannot be written.
    """
    orders = prunable.orders(plan)
    folder.statistics.mkdir(exist_ok=True)
    tensors = {
        f"layers.{index}.{name}": getattr(order, name).cpu().contiguous()
        for index, order in enumerate(orders)
        for name in ("groups", "heads", "channels")
    }
    save(tensors, folder.statistics / "ranking.safetensors")
    layers = [
        {"kv_groups": x.kv_groups, "q_per_group": x.q_per_group, "mlp_channels": x.mlp_channels}
        for x in plan.layers
    ]
    budget = {
        "kind": bench.budget.kind,
        "target": bench.budget.target,
        "achieved": bench.achieved(plan),
    }
    folder.write_json(
        "plan.json",
        {
            "schema_version": 1,
            "model": bench.config.model,
            "units": {"attention": bench.grid.unit, "mlp": "channel"},
            "layers": layers,
            "order_hash": order_hash(orders),
            "budget": budget,
        },
    )


def _checked(pruned: PreTrainedModel, folder: Path, bench: Workbench) -> PreTrainedModel:
    """Reload what was exported, compare logits, bit for bit, and return it.

    Raises:
        RuntimeError: they differ: a defect of this program.
    """
    if bench.scratch is None:
        reloaded = type(pruned).from_pretrained(folder, dtype=pruned.dtype).to(pruned.device).eval()
    else:
        reloaded = reopened(pruned, folder)
    tokens = next(iter(bench.texts.report.values()), bench.texts.select)[:1].to(pruned.device)
    with torch.no_grad():
        read, held = (model(tokens).logits for model in (reloaded, pruned))
        if not torch.allclose(read, held, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"{folder}: the exported model differs from the one in memory")
    return reloaded
