"""The pipeline: one command from a pretrained model to a smaller one with a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agent.drivers.driver import Driver
from agent.graph import SearchResult, run_search
from agent.ledger import Ledger
from agent.state import SearchContext
from evaluators.choices import ChoiceItem, EncodedChoices, encode_choices
from prompts.library import Strategy, load_strategy
from pruning.elastic import Prunable
from pruning.export import export, is_stock
from pruning.plan import Plan
from pruning.ranking import order_hash
from selfpruner.config import RunConfig
from selfpruner.data import load_choice_items
from selfpruner.finishing import control_models, finish, mean_fitness
from selfpruner.fitness import Fitness
from selfpruner.model_card import model_card
from selfpruner.progress import Progress
from selfpruner.report import write_report
from selfpruner.run_folder import RunFolder
from selfpruner.speed_model import SpeedModel, fit_speed
from selfpruner.verdict import Outcome, verdict
from selfpruner.workbench import Workbench, prepare, quiet_libraries, rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress(config: RunConfig, folder: RunFolder, progress: Progress) -> Path:
    """Run every stage and return the path of the report.

    Raises:
        ValueError: what is asked for cannot be had; one line.
        OSError: the run folder cannot be written.
    """
    quiet_libraries()
    torch.manual_seed(config.seed)
    strategy = load_strategy(config.search.strategy) if _asks_llm(config) else None
    bench = prepare(config, progress)
    _check_disk(bench, folder)
    prunable, errors = rank(bench, progress)
    score, selection, speed = _judges_of_plans(bench, prunable, progress)
    found = _search(bench, folder, score, speed, errors, strategy, progress)
    best, selected = _selected(found, selection)
    _write_plan(bench, prunable, best, folder)
    model, refitted = finish(bench, prunable, best, selection, progress)
    controls, warnings = control_models(bench, prunable, selection, progress)
    del prunable, score, selection
    pruned = export(model, bench.tokenizer, folder.model, getattr(torch, config.export.dtype))
    _check_export(pruned, folder.model, bench)
    outcome = Outcome(best, found, selected, refitted, controls, warnings)
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


def _asks_llm(config: RunConfig) -> bool:
    return config.search.allocator == "llm"


def _judges_of_plans(
    bench: Workbench, prunable: Prunable, progress: Progress
) -> tuple[Fitness, Fitness, SpeedModel]:
    """Return the fitness on search tokens, the same on selection tokens, and predicted speed."""
    config = bench.config
    with progress.stage("speed model"):
        speed = fit_speed(
            prunable, bench.grid, bench.architecture.layers, tokens=config.data.length
        )
    score, selection = (
        Fitness(
            prunable,
            bench.model,
            bench.family,
            config.fitness,
            tokens,
            choices=_choices(bench),
            speed=speed,
            batch_size=config.evaluation.batch_size,
        )
        for tokens in (bench.texts.search, bench.texts.select)
    )
    return score, selection, speed


def _choices(bench: Workbench) -> EncodedChoices | None:
    data = bench.config.data
    if not data.choices:
        return None
    rows = load_choice_items(data.choices, bench.config.seed, data.root)
    items = [ChoiceItem(x["context"], tuple(x["choices"]), x["gold"]) for x in rows]
    return encode_choices(bench.tokenizer, items)


def _search(
    bench: Workbench,
    folder: RunFolder,
    score: Fitness,
    speed: SpeedModel,
    errors: Any,
    strategy: Strategy | None,
    progress: Progress,
) -> SearchResult:
    """Return the outcome of the search within the budget of evaluations."""
    config = bench.config

    def assess(plan: Plan) -> dict[str, float]:
        facts = {"speedup": speed.speedup(plan)}
        return facts | ({"accuracy": score.accuracy(plan)} if config.data.choices else {})

    with progress.stage("search", config.search.evaluations) as advance:
        context = SearchContext(
            settings=config.search,
            driver_settings=config.driver,
            seed=config.seed,
            grid=bench.grid,
            budget=bench.budget,
            score=score,
            sequences=range(score.num_sequences),
            sensitivity=errors,
            assess=assess,
            driver=_driver(bench) if strategy else None,
            strategy=strategy,
            ledger=Ledger(folder.path),
            clock=time.monotonic,
            on_event=_narrator(advance, progress),
        )
        return run_search(context, folder.checkpoints)


def _narrator(advance: Callable[..., None], progress: Progress) -> Callable[[dict[str, Any]], None]:
    """Return a listener that moves the bar and prints a line a generation."""

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] == "candidate":
            advance()
        elif event["kind"] == "generation":
            facts = [f"generation {event['generation']}: fitness {event['best_fitness']:.4f}"]
            if event["accuracy"] is not None:
                facts.append(f"accuracy {event['accuracy']:.2f}")
            if event["speedup"] is not None:
                facts.append(f"predicted speedup {event['speedup']:.2f}x")
            progress.note(", ".join(facts))

    return tell


def _driver(bench: Workbench) -> Driver:
    """Return the in-process driver: the model being pruned, or another one."""
    from agent.drivers.embedded import EmbeddedDriver
    from pruning.loading import load

    settings = bench.config.driver
    model, tokenizer, name = bench.model, bench.tokenizer, bench.config.model
    if settings.model is not None and settings.model != name:
        name = settings.model
        model, tokenizer = load(
            name,
            bench.model.dtype,
            str(bench.model.device),
            trust_remote_code=bench.config.trust_remote_code,
        )
    return EmbeddedDriver(model, tokenizer, name, settings.batch)


def _selected(found: SearchResult, selection: Fitness) -> tuple[Plan, float]:
    """Return the finalist with the best fitness on fresh tokens, and that fitness."""
    scored = [(mean_fitness(selection, x.plan), i) for i, x in enumerate(found.finalists)]
    fitness, index = min(scored)
    return found.finalists[index].plan, fitness


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
