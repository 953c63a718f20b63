"""The verdict: both models judged, and every number of a run in one record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.candidate import Candidate
from agent.graph import SearchResult
from agent.ledger import Ledger
from evaluators.memory import peak_resident_bytes
from evaluators.tasks import MEAN_CONVENTION, TaskScore
from pruning.export import cast_parameters
from pruning.loading import load_spread, whereabouts
from pruning.plan import Plan
from pruning.registration import register_with_transformers
from selfpruner import judge
from selfpruner.config import RunConfig
from selfpruner.environment import environment
from selfpruner.progress import Progress
from selfpruner.results import (
    BudgetNumbers,
    Control,
    Cost,
    Evaluation,
    FrontPoint,
    GenerationRow,
    HistoryRow,
    LayerUnits,
    Macs,
    Memory,
    ModelNumbers,
    Quality,
    Refit,
    Results,
    SearchNumbers,
    Speed,
    Units,
)
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import Workbench, resolved_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outcome:
    """What the search and the finishing came to.

    Attributes:
        selected: the finalist that was taken; its fitness is on search tokens.
        found: the search.
        selection_fitness: of the selected plan, on fresh tokens.
        refit: what the final refit did, None where it is off.
        controls: simple plans within the same budget.
        warnings: what the reader should know first.
        front: the best plan of each budget, none where no further ones were asked for.
    """

    selected: Candidate
    found: SearchResult
    selection_fitness: float
    refit: Refit | None
    controls: Mapping[str, Control]
    warnings: tuple[str, ...]
    front: tuple[FrontPoint, ...] = ()


def verdict(
    bench: Workbench,
    pruned: PreTrainedModel,
    outcome: Outcome,
    folder: RunFolder,
    progress: Progress,
) -> Results:
    """Judge the dense and the exported model, both in the run's dtype, and return the record.

    Their bytes are those in the dtype of the export: of what pruning alone saves. What is streamed
    is let go of before the tasks.
    """
    bytes_per_weight, ledger = pruned.dtype.itemsize, Ledger(folder.path)
    sizes = {"dense": judge.sizes(bench.model), "pruned": judge.sizes(pruned)}
    judged_on = environment(bench.config.seed) | _judged_on(bench)
    models = {"dense": bench.model, "pruned": cast_parameters(pruned, bench.model.dtype)}
    quality = _quality(bench, models, folder, progress)
    with progress.stage("speed"):
        rows = judge.speed_rows(
            models["dense"], models["pruned"], bench.config.judged, bench.config.seed
        )
    with progress.stage("samples"):
        samples = judge.samples(models["dense"], models["pruned"], bench.tokenizer)
    return Results(
        schema_version=1,
        model=ModelNumbers(
            name=bench.config.model,
            family=bench.family.name,
            parameters_dense=sizes["dense"]["parameters"],
            parameters_pruned=sizes["pruned"]["parameters"],
        ),
        budget=BudgetNumbers(
            kind=bench.budget.kind,
            target=bench.budget.target,
            achieved=bench.achieved(outcome.selected.plan),
        ),
        recipe=bench.config.recipe,
        search=_search_numbers(bench.config, outcome, ledger),
        quality=quality,
        speed=Speed(rows=rows),
        memory=Memory(
            dense_bytes=bytes_per_weight * sizes["dense"]["parameters"],
            pruned_bytes=sizes["pruned"]["bytes"],
        ),
        units=_units(outcome.selected.plan),
        units_dense=Units(
            kv_groups=bench.architecture.kv_heads,
            q_per_group=bench.architecture.q_per_group,
            mlp_channels=bench.architecture.mlp,
        ),
        history=_history(ledger),
        generations=tuple(GenerationRow(**x) for x in outcome.found.generations),
        front=outcome.front,
        controls=dict(outcome.controls),
        samples=samples,
        cost=Cost(stage_seconds=dict(progress.seconds), peak_memory_bytes=peak_resident_bytes()),
        refit=outcome.refit,
        warnings=outcome.warnings,
        macs=_macs(bench, outcome.selected.plan),
        evaluation=_evaluation(bench),
        environment=json.loads(json.dumps(judged_on)),
    )


def _quality(
    bench: Workbench,
    models: Mapping[str, PreTrainedModel],
    folder: RunFolder,
    progress: Progress,
) -> Quality:
    config, settings = bench.config, bench.config.evaluation
    with progress.stage("perplexity"):
        texts = {
            label: judge.perplexities(model, bench.family, bench.texts.report, settings.batch_size)
            for label, model in models.items()
        }
    if bench.scratch is None:
        scores = {
            label: judge.tasks(model, bench.tokenizer, settings, config.seed, progress, label)
            for label, model in models.items()
        }
    else:
        for model in models.values():
            model.to("meta")
        names = {"dense": config.model, "pruned": str(folder.model)}
        scores = {label: _spread_tasks(bench, label, names[label], progress) for label in models}
    return Quality(
        dense=judge.quality(scores["dense"], texts["dense"]),
        pruned=judge.quality(scores["pruned"], texts["pruned"]),
        difference=judge.difference(scores["dense"], scores["pruned"], config.seed),
    )


def _spread_tasks(
    bench: Workbench, label: str, name: str, progress: Progress
) -> dict[str, TaskScore]:
    """Return the scores of a model that is open for them alone, spread over what there is."""
    config, settings = bench.config, bench.config.evaluation
    if not settings.tasks:
        return {}
    register_with_transformers()
    with progress.stage(f"open {label}"):
        model, _ = load_spread(
            name,
            bench.model.dtype,
            resolved_device(config),
            trust_remote_code=config.trust_remote_code,
        )
    progress.note(f"{label}: {whereabouts(model)}")
    return judge.tasks(model, bench.tokenizer, settings, config.seed, progress, label)


def _judged_on(bench: Workbench) -> dict[str, str]:
    """Return how both models were judged: as they were when the search ran."""
    head = bench.family.head(bench.model)
    return {"dtype": str(head.dtype).removeprefix("torch."), "device": head.device.type}


def _driver(config: RunConfig, ledger: Ledger) -> str:
    """Return the kinds of drivers, and the models by which they replied, in order."""
    kinds = ", then ".join(x.kind for x in config.driver.chain)
    models = dict.fromkeys(x.model for x in ledger.lines() if x.reply is not None and x.model)
    return f"{kinds}: {', '.join(models) or 'no reply'}"


def _search_numbers(config: RunConfig, outcome: Outcome, ledger: Ledger) -> SearchNumbers:
    found = outcome.found
    asks_llm, placebo = config.search.asks_llm, config.search.placebo
    return SearchNumbers(
        allocator=config.search.allocator,
        driver=_driver(config, ledger) if asks_llm else None,
        strategy=config.search.strategy if asks_llm else None,
        placebo=placebo if asks_llm and placebo != "none" else None,
        evaluations=found.evaluations,
        equivalents=found.equivalents,
        slopes=found.slopes,
        llm_calls=found.llm_calls,
        llm_tokens=found.llm_tokens,
        llm_cost=found.llm_cost,
        llm_failures=found.llm_failures,
        duplicates=found.duplicates,
        fallbacks=found.fallbacks,
        stopped=found.stopped,
        best_fitness=found.lowest_fitness,
        selected_fitness=outcome.selected.fitness,
        selection_fitness=outcome.selection_fitness,
        fitness=dict(config.fitness),
        predicted=str(config.workload),
        wall_seconds=found.seconds,
    )


def _units(plan: Plan) -> tuple[LayerUnits, ...]:
    return tuple(
        LayerUnits(
            layer=index,
            kv_groups=layer.kv_groups,
            q_per_group=layer.q_per_group,
            mlp_channels=layer.mlp_channels,
        )
        for index, layer in enumerate(plan.layers)
    )


def _macs(bench: Workbench, plan: Plan) -> Macs:
    tokens = bench.config.evaluation.speed.prompt_tokens
    dense = Plan.dense(bench.architecture)
    return Macs(
        dense=bench.architecture.total_macs(dense, tokens),
        pruned=bench.architecture.total_macs(plan, tokens),
        tokens=tokens,
    )


def _evaluation(bench: Workbench) -> Evaluation:
    settings = bench.config.evaluation
    return Evaluation(
        batch_size=settings.batch_size,
        samples=settings.samples,
        perplexity_length={k: int(v.shape[1]) for k, v in bench.texts.report.items()},
        mean_convention=MEAN_CONVENTION,
    )


def _history(ledger: Ledger) -> tuple[HistoryRow, ...]:
    rows, best = [], float("inf")
    for number, candidate in enumerate(ledger.candidates(), start=1):
        best = min(best, candidate.fitness)
        rows.append(
            HistoryRow(
                evaluation=number,
                generation=candidate.generation,
                operator=candidate.operator,
                origin=candidate.origin,
                fitness=candidate.fitness,
                best=best,
            )
        )
    return tuple(rows)
