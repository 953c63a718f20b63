"""Finishing: from a plan to the smaller model, refitted where that helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from agent import allocators
from agent.candidate import Candidate
from agent.graph import SearchResult
from pruning.elastic import ElasticModel, Prunable
from pruning.plan import Plan
from pruning.refit import refit
from pruning.slicing import sliced, sliced_on_disk
from pruning.streaming import LayerWriter, layer_tensors, reopened
from selfpruner import judge
from selfpruner.fitness import Finished, Fitness, Judge
from selfpruner.progress import Progress
from selfpruner.results import Control, Refit
from selfpruner.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    FinishedPlan = tuple[PreTrainedModel, Refit | None]


def finish(
    bench: Workbench,
    prunable: Prunable,
    plans: Mapping[str, Plan],
    selection: Fitness,
    progress: Progress,
) -> dict[str, FinishedPlan]:
    """Return by name the sliced model of each plan and what the refit did, None where it is off.

    All are refitted in one pass over the dense model; the refit of each is kept only if it lowers
    the fitness on selection tokens.
    """
    models = {name: _sliced(bench, prunable, name, plan) for name, plan in plans.items()}
    if not bench.config.pruning.refit:
        return {name: (model, None) for name, model in models.items()}

    def fitness(models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
        rows = bench.config.evaluation.batch_size
        runs = {name: Finished(model, bench.family, rows) for name, model in models.items()}
        return {name: mean_fitness(selection.of(x), [plans[name]])[0] for name, x in runs.items()}

    before = fitness(models)
    refitted = _refitted(bench, prunable, plans, models, progress)
    after = fitness(refitted)
    refits = {name: _judged(before[name], after[name]) for name in plans}

    def unchanged(name: str) -> PreTrainedModel:
        is_held = refitted[name] is models[name]  # and refitted in place
        return _sliced(bench, prunable, name, plans[name]) if is_held else models[name]

    return {
        name: (refitted[name] if refits[name].kept else unchanged(name), refits[name])
        for name in plans
    }


def _sliced(bench: Workbench, prunable: Prunable, name: str, plan: Plan) -> PreTrainedModel:
    """Return the sliced model, streamed if the run is."""
    if bench.scratch is None:
        return sliced(prunable, plan)
    assert isinstance(prunable, ElasticModel)
    return sliced_on_disk(prunable, plan, bench.scratch / "sliced" / name)


def _refitted(
    bench: Workbench,
    prunable: Prunable,
    plans: Mapping[str, Plan],
    models: Mapping[str, PreTrainedModel],
    progress: Progress,
) -> Mapping[str, PreTrainedModel]:
    """Return the refitted models: the same ones in memory, others where they are streamed."""
    names, scratch = list(models), bench.scratch
    writers: list[LayerWriter] = []
    if scratch is not None:
        folders = {name: scratch / "refitted" / name for name in names}
        writers = [LayerWriter(models[name], folders[name]) for name in names]

    def keep(number: int, index: int, layer: nn.Module) -> None:
        if writers:
            writers[number].add(layer_tensors(layer, index))

    with progress.stage("refit", bench.architecture.layers) as advance:
        refit(
            list(models.values()),
            bench.model,
            bench.family,
            [prunable.orders(plan) for plan in plans.values()],
            bench.texts.calibrate,
            target=bench.config.pruning.refit_target,
            batch_size=bench.config.evaluation.batch_size,
            keep=keep,
            on_layer=lambda _: advance(),
        )
    if scratch is None:
        return models
    for writer in writers:
        writer.close()
    return {name: reopened(model, folders[name]) for name, model in models.items()}


def _judged(before: float, after: float) -> Refit:
    # What is no number is below nothing, and a refit may mend it.
    is_mended = math.isnan(before) and not math.isnan(after)
    return Refit(kept=after < before or is_mended, before=before, after=after)


def best_on_fresh_tokens(found: SearchResult, selection: Fitness) -> tuple[Candidate, float]:
    """Return the finalist with the best fitness on fresh tokens, and that fitness.

    One that is not finite comes after all others.
    """
    scored = mean_fitness(selection, [x.plan for x in found.finalists])
    index = min(range(len(scored)), key=lambda i: (not math.isfinite(scored[i]), scored[i], i))
    return found.finalists[index], scored[index]


def mean_fitness(fitness: Judge, plans: Sequence[Plan]) -> list[float]:
    """Return the mean fitness of each plan over all sequences."""
    return [float(row.mean()) for row in fitness(plans, range(fitness.num_sequences))]


def control_plans(bench: Workbench) -> tuple[dict[str, Plan], tuple[str, ...]]:
    """Return the simple plans that are finished beside the found one; a warning for each missing.

    One is missing where no plan of its kind is within the budget.
    """
    makers = {"uniform": allocators.uniform, "uniform_mlp": allocators.uniform_mlp}
    plans: dict[str, Plan] = {}
    warnings = []
    for name in bench.config.evaluation.controls:
        try:
            plans[name] = bench.grid.plan(makers[name](bench.space))
        except ValueError as error:
            warnings.append(f"control {name} left out: {error}")
    return plans, tuple(warnings)


def judged_controls(
    bench: Workbench, finished: Mapping[str, FinishedPlan], progress: Progress
) -> dict[str, Control]:
    """Return what the finished controls are judged by."""
    if not finished:
        return {}
    batch_size = bench.config.evaluation.batch_size
    with progress.stage("controls"):
        return {
            name: Control(
                parameters=judge.sizes(model)["parameters"],
                perplexity=dict(
                    judge.perplexities(model, bench.family, bench.texts.report, batch_size)
                ),
            )
            for name, (model, _) in finished.items()
        }
