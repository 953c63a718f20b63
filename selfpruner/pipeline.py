"""The pipeline: one command from a pretrained model to a smaller one with a report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from agent.ledger import Ledger
from evaluators.tasks import task_texts
from pruning.elastic import Prunable
from pruning.export import export, is_stock
from pruning.plan import Plan
from pruning.ranking import order_hash
from selfpruner.config import RunConfig
from selfpruner.data import load_choice_items
from selfpruner.finishing import best_on_fresh_tokens, control_plans, finish, judged_controls
from selfpruner.front import front
from selfpruner.heap import share_heap
from selfpruner.model_card import model_card
from selfpruner.overlap import check_items
from selfpruner.progress import Progress
from selfpruner.report import write_report
from selfpruner.resident import opened_arena
from selfpruner.run_folder import RunFolder
from selfpruner.searching import check_words_and_drivers, search
from selfpruner.verdict import Outcome, verdict
from selfpruner.workbench import Workbench, prepare, quiet_libraries
from selfpruner.workforce import Workforce

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FOUND = "found"


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
    share_heap()
    quiet_libraries()
    torch.manual_seed(config.seed)
    check_words_and_drivers(config)
    bench = prepare(config, progress)
    _check_disk(bench, folder)
    _check_items(config)
    with opened_arena(bench, folder, progress, workforce or Workforce()) as arena:
        found = search(arena, config, folder, progress)
        selected, fitness = best_on_fresh_tokens(found, arena.selection)
        points = front(arena, found, folder, progress) if config.front.targets else ()
    prunable, selection, best = arena.prunable, arena.selection, selected.plan
    _write_plan(bench, prunable, best, folder)
    plans, warnings = control_plans(bench)
    finished = finish(bench, prunable, {_FOUND: best, **plans}, selection, progress)
    model, refitted = finished.pop(_FOUND)
    controls = judged_controls(bench, finished, progress)
    del prunable, selection, arena, finished
    pruned = export(model, bench.tokenizer, folder.model, getattr(torch, config.export.dtype))
    _check_export(pruned, folder.model, bench)
    outcome = Outcome(selected, found, fitness, refitted, controls, warnings, points)
    results = verdict(bench, pruned, outcome, Ledger(folder.path), progress)
    results.save(folder.results)
    card = model_card(results, is_stock(pruned))
    (folder.model / "README.md").write_text(card, encoding="utf-8")
    return write_report(folder.path)


def _check_disk(bench: Workbench, folder: RunFolder) -> None:
    """Refuse a disk without room for the exported model, before anything is computed.

    Raises:
        ValueError: less is free than the largest model of the budget would take.
    """
    dtype: torch.dtype = getattr(torch, bench.config.export.dtype)
    share = bench.budget.limit / bench.budget.dense if bench.budget.kind != "macs" else 1.0
    weights = min(share, 1.0) * bench.architecture.block_parameters()
    needed = (weights + bench.architecture.fixed_parameters(True)) * dtype.itemsize
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise ValueError(
            f"{folder}: {free / 1e6:.0f} MB are free, the pruned model needs {needed / 1e6:.0f} MB"
        )


def _check_items(config: RunConfig) -> None:
    """Refuse to search on items that are reported later.

    Raises:
        ValueError: one is; one line.
    """
    if config.data.choices and config.evaluation.tasks:
        items = load_choice_items(config.data.choices, config.seed, config.data.root)
        check_items(items, task_texts(config.evaluation.tasks))


def _write_plan(bench: Workbench, prunable: Prunable, plan: Plan, folder: RunFolder) -> None:
    """Write plan.json and the ranking it is to be read with."""
    from safetensors.torch import save_file

    orders = prunable.orders(plan)
    folder.statistics.mkdir(exist_ok=True)
    tensors = {
        f"layers.{index}.{name}": getattr(order, name).cpu().contiguous()
        for index, order in enumerate(orders)
        for name in ("groups", "heads", "channels")
    }
    save_file(tensors, folder.statistics / "ranking.safetensors")
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


def _check_export(pruned: PreTrainedModel, folder: Path, bench: Workbench) -> None:
    """Reload what was exported and compare logits, bit for bit.

    Raises:
        RuntimeError: they differ: a defect of this program.
    """
    reloaded = type(pruned).from_pretrained(folder, dtype=pruned.dtype).to(pruned.device).eval()
    tokens = next(iter(bench.texts.report.values()))[:1].to(pruned.device)
    with torch.no_grad():
        if not torch.equal(reloaded(tokens).logits, pruned(tokens).logits):
            raise RuntimeError(f"{folder}: the exported model differs from the one in memory")
