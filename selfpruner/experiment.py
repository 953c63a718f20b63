"""Experiments: arms that differ in how plans are proposed, over seeds, on one ranked model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from agent.candidate import Candidate
from agent.ledger import Ledger
from prompts.library import load_strategy
from selfpruner.arena import Arena
from selfpruner.cells import Cell, Row, run_cells
from selfpruner.complaints import complaints
from selfpruner.config import RunConfig, load_config
from selfpruner.finishing import mean_fitness
from selfpruner.heap import share_heap
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder, is_run_folder
from selfpruner.searching import check_words_and_drivers, search
from selfpruner.settings import Settings
from selfpruner.workbench import prepare, quiet_libraries
from selfpruner.yaml_text import read_mapping

_SHARED = ("search.", "driver.")


class ExperimentConfig(Settings):
    """Arms by name, each a set of dotted settings over the base; all of them share the others."""

    base: str = Field(min_length=1, description="run configuration, a path from this file's folder")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of the searches")
    settings: dict[str, Any] = Field(default_factory=dict, description="over the base, all arms")
    arms: dict[str, dict[str, Any]] = Field(min_length=1, description="search.* and driver.* only")


def load_experiment(path: Path) -> ExperimentConfig:
    """Return the experiment of a YAML file.

    Raises:
        ValueError: one line for each thing that is wrong.
    """
    try:
        config = ExperimentConfig.model_validate_json(json.dumps(read_mapping(path)), strict=True)
    except ValidationError as error:
        lines = complaints(ExperimentConfig, error, lambda _: str(path))
        raise ValueError("\n".join(lines)) from None
    for arm, settings in config.arms.items():
        for name in settings:
            if not name.startswith(_SHARED):
                raise ValueError(
                    f"{path}: arms.{arm}: got {name}; allowed: names that start with search. or "
                    "driver., because all arms share one ranked model"
                )
    return config


def experiment(path: Path, folder: Path, results: Path, progress: Progress) -> list[Row]:
    """Run the cells (arm, seed) that are not in `results` yet; return the rows of all.

    Searches live in `folder`, where a stopped one is gone on with.

    Raises:
        ValueError: what is asked for cannot be had; one line.
        KeyboardInterrupt: a signal asked for a stop.
    """
    share_heap()
    quiet_libraries()
    config = load_experiment(path)
    base = _configured(path, config, {})
    runs = {arm: _configured(path, config, settings) for arm, settings in config.arms.items()}
    for run in runs.values():
        check_words_and_drivers(run)

    @cache
    def arena() -> Arena:
        return Arena.open(prepare(base, progress), _folder(folder, base), progress)

    def figures(cell: Cell) -> dict[str, Any]:
        run = runs[cell["arm"]].model_copy(update={"seed": cell["seed"]})
        progress.note(f"cell: {cell['arm']}, seed {cell['seed']}")
        return _searched(arena(), run, folder / f"{cell['arm']}-{cell['seed']}", progress)

    # Interleaved by seed, so that an unfinished experiment has all arms at the first seeds.
    cells = [
        {"experiment": path.stem, "arm": arm, "seed": seed, "settings": _digest(runs[arm])}
        for seed in config.seeds
        for arm in config.arms
    ]
    return run_cells(results, cells, figures)


def _configured(path: Path, config: ExperimentConfig, arm: dict[str, Any]) -> RunConfig:
    settings = [f"{k}={json.dumps(v)}" for k, v in {**config.settings, **arm}.items()]
    return load_config(path.parent / config.base, settings=settings)


def _digest(run: RunConfig) -> str:
    """Return what a cell's figures depend on beside its arm and seed, as a short hash."""
    words = asdict(load_strategy(run.search.strategy)) if run.search.allocator == "llm" else {}
    text = run.to_yaml() + json.dumps(words, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _folder(path: Path, config: RunConfig) -> RunFolder:
    return RunFolder.open(path) if is_run_folder(path) else RunFolder.create(path, config)


def _searched(arena: Arena, run: RunConfig, path: Path, progress: Progress) -> dict[str, Any]:
    """Return the figures of one search."""
    folder = _folder(path, run)
    found = search(arena.proposing(run), run, folder, progress)
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
        "steps": [
            {
                "evaluations": _evaluations_until(ledger, x),
                "tokens": _tokens_until(ledger, x),
                "fitness": x.fitness,
                "selection_fitness": mean_fitness(arena.selection, x.plan),
            }
            for x in _improvements(ledger)
        ],
    }


def _improvements(ledger: Ledger) -> list[Candidate]:
    """Return the complete candidates that were the best when they were scored."""
    kept: list[Candidate] = []
    for candidate in ledger.candidates():
        if candidate.is_complete and (not kept or candidate.fitness < kept[-1].fitness):
            kept.append(candidate)
    return kept


def _evaluations_until(ledger: Ledger, candidate: Candidate) -> float:
    """Return the full evaluations that scoring took up to this candidate."""
    return float(sum(x.charge for x in ledger.candidates() if x.id <= candidate.id))


def _tokens_until(ledger: Ledger, candidate: Candidate) -> int:
    """Return the tokens spent when the candidate's generation was scored."""
    return sum(x.tokens for x in ledger.lines() if x.generation <= candidate.generation)
