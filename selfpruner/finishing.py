"""Finishing: from a plan to the smaller model, refitted where that helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import allocators
from agent.candidate import Candidate
from agent.graph import SearchResult
from pruning.elastic import Prunable
from pruning.plan import Plan
from pruning.refit import refit
from pruning.slicing import sliced
from selfpruner import judge
from selfpruner.fitness import Finished, Fitness
from selfpruner.progress import Progress
from selfpruner.results import Control, Refit
from selfpruner.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finish(
    bench: Workbench,
    prunable: Prunable,
    plan: Plan,
    selection: Fitness,
    progress: Progress,
    label: str = "refit",
) -> tuple[PreTrainedModel, Refit | None]:
    """Return the sliced model of `plan` and what the refit did, None where it is off.

    The refit is kept only if it lowers the fitness on selection tokens.
    """
    model = sliced(prunable, plan)
    if not bench.config.pruning.refit:
        return model, None
    before = mean_fitness(selection.of(Finished(model)), plan)
    with progress.stage(label, bench.architecture.layers) as advance:
        refit(
            model,
            bench.model,
            bench.family,
            prunable.orders(plan),
            bench.texts.calibrate,
            target=bench.config.pruning.refit_target,
            batch_size=bench.config.evaluation.batch_size,
            on_layer=lambda _: advance(),
        )
    after = mean_fitness(selection.of(Finished(model)), plan)
    kept = after < before
    return model if kept else sliced(prunable, plan), Refit(kept=kept, before=before, after=after)


def best_on_fresh_tokens(found: SearchResult, selection: Fitness) -> tuple[Candidate, float]:
    """Return the finalist with the best fitness on fresh tokens, and that fitness."""
    scored = [(mean_fitness(selection, x.plan), i) for i, x in enumerate(found.finalists)]
    fitness, index = min(scored)
    return found.finalists[index], fitness


def mean_fitness(fitness: Fitness, plan: Plan) -> float:
    """Return the mean fitness of one plan over all sequences."""
    return float(fitness([plan], range(fitness.num_sequences)).mean())


def control_models(
    bench: Workbench, prunable: Prunable, selection: Fitness, progress: Progress
) -> tuple[dict[str, Control], tuple[str, ...]]:
    """Return the simple plans, finished by the same recipe; a warning where one is impossible."""
    makers = {"uniform": allocators.uniform, "uniform_mlp": allocators.uniform_mlp}
    controls: dict[str, Control] = {}
    warnings = []
    for name in bench.config.evaluation.controls:
        try:
            plan = bench.grid.plan(makers[name](bench.space))
        except ValueError as error:
            warnings.append(f"control {name} left out: {error}")
            continue
        model, _ = finish(bench, prunable, plan, selection, progress, f"control {name}")
        controls[name] = Control(
            parameters=judge.sizes(model)["parameters"],
            perplexity=dict(
                judge.perplexities(model, bench.texts.report, bench.config.evaluation.batch_size)
            ),
        )
    return controls, tuple(warnings)
