"""Experiments: arms that differ in how plans are proposed, over seeds, budgets and models."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from agent.drivers.driver import DriverError
from agent.graph import SearchResult
from agent.ledger import Ledger
from agent.racing import NOT_FINITE
from prompts.library import load_strategy
from pruning.loading import architecture_of
from selfpruner.arena import Arena
from selfpruner.cells import Cell, Figures, Outcomes, finish_cells, run_cells
from selfpruner.config import RunConfig
from selfpruner.crew import Work
from selfpruner.environment import device_name
from selfpruner.experiment_config import Experiment, load_experiment
from selfpruner.experiment_page import write_experiment_page
from selfpruner.experiment_study import Study
from selfpruner.finishing import mean_fitness
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.searching import check_words_and_drivers, search
from selfpruner.stopping import terminable
from selfpruner.workbench import (
    budget_of,
    grid_of,
    prepare,
    resolved_device,
    settle_process,
)
from selfpruner.workers import in_workers, take_device
from selfpruner.workforce import Workforce


def run_experiment(
    path: Path,
    folder: Path,
    results: Path,
    progress: Progress,
    *,
    workforce: Workforce | None = None,
) -> Study:
    """Run the cells that are not in `results` yet; return what all that are finished say.

    Searches live in `folder`, where a stopped one is gone on with, and so does the page,
    `experiment.html`, also where cells are missing. Figures do not depend on the number of
    workers, but on that of threads: sums are rounded in another order.

    Args:
        path: file of the experiment.
        folder: of its searches.
        results: file of finished cells.
        progress: what the user sees; a worker writes to `worker-N.log` in the folder.
        workforce: cells at a time, each in a process with its own model; None: in this process.

    Raises:
        ValueError: what is asked for cannot be had, or no cell was finished; one line.
        KeyboardInterrupt: a signal asked for a stop.
        DriverError: all drivers of an arm gave up.
    """
    plan, workforce = load_experiment(path), workforce or Workforce()
    if plan.base.memory == "streamed" and not workforce.is_alone:
        raise ValueError(f"{path}: memory: got streamed; allowed with --workers: whole")
    for run in plan.runs.values():
        check_words_and_drivers(run)
    _check_budgets(plan)
    cells = cells_of(plan)
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).locked(), terminable(), _goes_on(progress), _without_scratch(folder):
        if workforce.is_alone:
            searches = _Searches(plan, folder, progress, workforce.threads)
            rows = run_cells(results, cells, searches)
        else:
            work = partial(_in_worker, path.resolve(), folder.resolve(), workforce.threads)
            on_gpus = resolved_device(plan.base) == "cuda"
            outcomes = partial(_outcomes, work, workforce, on_gpus, progress)
            rows = finish_cells(results, cells, outcomes)
    if not rows:
        raise ValueError(f"{path}: no cell was finished; the logs in {folder} say why")
    study = Study(plan.name, rows, plan.roles, plan.placebos, plan.config.control, len(cells))
    write_experiment_page(study, path, folder / "experiment.html")
    return study


def _check_budgets(plan: Experiment) -> None:
    """Refuse budgets that no plan of a model is within, before any cell is run.

    Budgets of time take the model, and are seen to in their cell.

    Raises:
        ValueError: one line.
    """
    for model in plan.models:
        run = plan.base.model_copy(update={"model": model})
        architecture = architecture_of(model, trust_remote_code=run.trust_remote_code)
        for budget in plan.budgets:
            if budget.kind != "speedup":
                asked = run.model_copy(update={"budget": budget})
                budget_of(asked, architecture, grid_of(asked, architecture))


@contextmanager
def _goes_on(progress: Progress) -> Iterator[None]:
    """Say at a stop how to go on."""
    try:
        yield
    except (KeyboardInterrupt, DriverError):
        progress.note("the same command goes on where it stopped")
        raise


@contextmanager
def _without_scratch(folder: Path) -> Iterator[None]:
    """Remove at the end what arenas of streamed models have written."""
    try:
        yield
    finally:
        for arena in folder.glob("*/arena*"):
            shutil.rmtree(RunFolder(arena).scratch, ignore_errors=True)


def cells_of(plan: Experiment) -> list[Cell]:
    """Return all cells, seed by seed: an unfinished experiment has all arms at the first seeds."""
    digests = {arm: digest_of(run) for arm, run in plan.runs.items()}
    return [
        {
            "experiment": plan.name,
            "model": model,
            "budget": budget.name,
            "arm": arm,
            "seed": seed,
            "settings": digests[arm],
        }
        for seed in plan.config.seeds
        for model in plan.models
        for budget in plan.budgets
        for arm in plan.runs
    ]


def digest_of(run: RunConfig) -> str:
    """Return what a cell's figures depend on beside what it names, as a short hash.

    Only what departs from the defaults counts, so that cells outlive settings that are added; a
    default that changes is to be written into the base file, or old cells are taken for new ones.
    """
    tree = run.model_dump(mode="json", exclude_defaults=True, exclude={"model", "budget"})
    words = asdict(load_strategy(run.search.strategy)) if run.search.asks_llm else {}
    text = json.dumps([tree, words], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Searches:
    """Runs cells in this process; the arena of one model is kept until another is asked for."""

    def __init__(
        self, plan: Experiment, folder: Path, progress: Progress, threads: int | None
    ) -> None:
        settle_process(streaming=plan.base.memory == "streamed")
        if threads is not None:
            torch.set_num_threads(threads)
        self._plan, self._folder, self._progress = plan, folder, progress
        self._arenas: dict[Path, Arena] = {}

    def __call__(self, cell: Cell) -> Figures:
        """Return the figures of one search, begun or gone on with."""
        self._progress.note(_named(cell))
        if digest_of(self._plan.runs[cell["arm"]]) != cell["settings"]:
            raise ValueError(
                f"arm {cell['arm']}: settings or prompts were changed during the experiment; the "
                "same command begins its cells anew"
            )
        budget = next(x for x in self._plan.budgets if x.name == cell["budget"])
        facts = {"model": cell["model"], "budget": budget, "seed": cell["seed"]}
        run = self._plan.runs[cell["arm"]].model_copy(update=facts)
        path = self._folder / _slug(cell["model"]) / cell["budget"]
        folder = RunFolder.begun(path / "{arm}-{seed}-{settings}".format_map(cell), run)
        arena = self._arena(run)
        arena.fix_order(folder)
        return _figures(arena.proposing(run), folder, self._progress)

    def _arena(self, cell: RunConfig) -> Arena:
        """Return the arena of a cell's model, with the seed of the base: all share its text.

        Budgets of time have one of their own for every workload that is to be faster, and so have
        settings of the base that were changed since.
        """
        path = self._folder / _slug(cell.model)
        run = self._plan.base.model_copy(update={"model": cell.model})
        if "speedup" in (cell.budget.kind, run.budget.kind):
            run = run.model_copy(update={"budget": cell.budget})
        asked = run.workload
        timed = run.budget.kind == "speedup"
        name = f"arena-{digest_of(run)}"
        if timed:
            name += f"-{asked.phase}-{asked.batch}-{asked.tokens}"
        if path / name not in self._arenas:
            self._arenas.clear()
            with _turn(path):
                folder = RunFolder.begun(path / name, run)
                bench = prepare(run, self._progress, folder)
                self._arenas[path / name] = Arena.open(bench, folder, self._progress)
        return self._arenas[path / name]


def _outcomes(
    work: Work[Cell, Figures],
    workforce: Workforce,
    on_gpus: bool,
    progress: Progress,
    cells: list[Cell],
) -> Outcomes:
    """Yield the outcomes of the workers and show them."""
    if not cells:
        return
    with (
        workforce.for_cells(work, on_gpus) as crew,
        progress.stage("cells", len(cells)) as advance,
        closing(in_workers(cells, crew, progress.note)) as outcomes,
    ):
        for cell, figures in outcomes:
            advance()
            progress.note(f"{_named(cell)}: {figures['seconds']:.0f} s")
            yield cell, figures


def _named(cell: Cell) -> str:
    return "cell: {model}, {budget}, {arm}, seed {seed}".format_map(cell)


def _in_worker(path: Path, folder: Path, threads: int | None, number: int, cell: Cell) -> Figures:
    return _worker(path, folder, threads, number)(cell)


@cache
def _worker(path: Path, folder: Path, threads: int | None, number: int) -> _Searches:
    """Return what runs the cells of this worker process, on a GPU of its own where there are."""
    take_device(number)
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / f"worker-{number}.log").open("a", encoding="utf-8", buffering=1)
    return _Searches(load_experiment(path), folder, Progress(log), threads)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process at a time open an arena: all share its timing, which wants it quiet."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _slug(model: str) -> str:
    """Return a model's name as a folder's, with what tells it from names that read alike."""
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", model).strip("_.") + f"-{digest}"


def _figures(arena: Arena, folder: RunFolder, progress: Progress) -> Figures:
    """Return the figures of one search; `evaluations` are full ones, `plans` those scored.

    `machine`: its figures are a little different on others, seconds very much so.
    """
    found = search(arena, arena.bench.config, folder, progress)
    ledger = Ledger(folder.path)
    return {
        "evaluations": found.equivalents,
        "plans": found.evaluations,
        "llm_calls": found.llm_calls,
        "llm_tokens": found.llm_tokens,
        "fallbacks": found.fallbacks,
        "duplicates": found.duplicates,
        "origins": found.origins,
        "seconds": round(found.seconds, 1),
        "machine": device_name(arena.bench.family.head(arena.bench.model).device),
        "steps": list(_steps(found, arena, ledger)),
    }


def _whole(fitness: float) -> float:
    """Return a fitness as searches have it: JSON has no word for what is not finite."""
    return fitness if abs(fitness) < NOT_FINITE else NOT_FINITE


def _steps(found: SearchResult, arena: Arena, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield every change of the plan that led, at the price of the generations up to it."""
    changes = [next(same) for _, same in groupby(found.leaders, key=lambda x: x[1].id)]
    plans = list(dict.fromkeys(x.plan for _, x in changes))
    fresh = dict(zip(plans, mean_fitness(arena.selection, plans), strict=True))
    for generation, candidate in changes:
        yield {
            "evaluations": float(ledger.price(generation)),
            "tokens": sum(x.tokens for x in ledger.lines() if x.generation <= generation),
            "fitness": candidate.fitness,
            "selection_fitness": _whole(fresh[candidate.plan]),
        }
