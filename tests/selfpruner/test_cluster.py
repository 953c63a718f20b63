"""A real Ray cluster of two workers on this machine: the numbers of one process, kills, stops."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from agent.graph import SearchResult
from pruning.plan import Plan
from selfpruner import cluster
from selfpruner.arena import Arena
from selfpruner.blocks import Block
from selfpruner.cli import main
from selfpruner.config import load_config
from selfpruner.crew import Work
from selfpruner.experiment import run_experiment
from selfpruner.fitness import Fitness
from selfpruner.progress import Progress
from selfpruner.resident import Post, opened_arena
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.sharing import Floats, SharedFitness
from selfpruner.workbench import prepare
from selfpruner.workers import in_workers
from selfpruner.workforce import Workforce

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")

TWO = Workforce(address=cluster.LOCAL, asked_threads=1)


@pytest.fixture(scope="module", autouse=True)
def _two_places() -> Iterator[None]:
    """Have one cluster for all tests here: Ray takes seconds to start."""
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{path}"  # what the workers will have
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    signal.signal(signal.SIGTERM, handler)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)
    sys.path.remove(here)
    os.environ["PYTHONPATH"] = path


def _mortal(arena: Arena, folder: RunFolder, path: Path) -> Work[Block, Floats]:
    """Return scoring by workers of which one dies, once; they keep their log in `path`."""
    mortal = importlib.import_module("scoring_workers").mortal
    return partial(mortal, path, Post.of(arena.bench, folder, 1))


def test_a_killed_worker_costs_its_batch_and_no_more(
    opened: tuple[Arena, RunFolder], plans_of: Callable[[Arena, int], list[Plan]], tmp_path: Path
) -> None:
    workers = importlib.import_module("scoring_workers")
    arena, folder = opened
    assert isinstance(arena.score, Fitness)
    plans, told = plans_of(arena, 12), list[str]()
    with TWO.residents(_mortal(arena, folder, tmp_path), False, told.append) as crew:
        shared = SharedFitness(arena.score, crew, 2, told.append)
        found = shared(plans, range(8))
        rows = workers.begun(tmp_path)
        lost = int((tmp_path / "died").read_text())
        assert sum(pairs for _, pairs in rows) == 12 * 8 + lost
        assert 0 < lost < 12 * 8 / 2
        # The other one may be done with all before the new one has ranked.
        assert len({process for process, _ in rows}) in (2, 3)
        assert told == ["a worker died; its batch is scored again"]
        assert np.array_equal(found, arena.score(plans, range(8)))
        left = [process for process, _ in rows]
    _wait_for(lambda: not any(psutil.pid_exists(x) for x in left))


def test_a_lost_node_leaves_the_work_to_the_others(
    opened: tuple[Arena, RunFolder],
    plans_of: Callable[[Arena, int], list[Plan]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that dies and has no room to begin again is not waited for."""
    arena, folder = opened
    plans, told = plans_of(arena, 12), list[str]()
    with TWO.residents(_mortal(arena, folder, tmp_path), False, told.append) as crew:
        assert isinstance(arena.score, Fitness)
        assert isinstance(crew, cluster.Actors)
        monkeypatch.setattr(cluster, "_PATIENCE", 1.0)
        monkeypatch.setattr(crew, "_make", crew._ray.remote(num_cpus=99)(cluster._Actor).remote)
        shared = SharedFitness(arena.score, crew, 2, told.append)
        assert np.array_equal(shared(plans, range(8)), arena.score(plans, range(8)))
    assert any(x.startswith("a worker is gone for good: --workers: none of 1 began") for x in told)


def _search(
    tiny_run: Path, path: Path, workforce: Workforce, *settings: str
) -> tuple[SearchResult, list[Any]]:
    """Return the outcome of a search and its ledger."""
    config = load_config(tiny_run, settings=settings)
    folder, progress = RunFolder.create(path, config), Progress(StringIO())
    bench = prepare(config, progress, folder)
    with opened_arena(bench, folder, progress, workforce) as opened:
        assert isinstance(opened.score, Fitness) == workforce.is_alone
        found = search(opened, config, folder, progress)
    return found, _ledger(path)


def _ledger(folder: Path) -> list[Any]:
    """Return the lines of a run's ledger without what a clock has measured."""
    lines = map(json.loads, (folder / "candidates.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in ("seconds", "speedup")} for x in lines]


@pytest.mark.parametrize("memory", ["whole", "streamed"])
def test_a_search_is_the_same_on_no_one_and_two_workers(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    settings = ("search.evaluations=30", "search.population=6", "data.search.tokens=128")
    settings += (f"memory={memory}",)
    alone, ledger = _search(tiny_run, tmp_path / "alone", Workforce(asked_threads=1), *settings)
    assert len(ledger) > 10
    two, its = _search(tiny_run, tmp_path / "two", TWO, *settings)
    assert its == ledger
    monkeypatch.setattr(cluster, "places", lambda *_: 1)
    one, its = _search(tiny_run, tmp_path / "one", TWO, *settings)
    assert its == ledger
    assert one.best.plan == two.best.plan == alone.best.plan


def test_cells_are_tasks_with_the_figures_of_one_process(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    matrix = {"search.allocator": ["genetic", "random"]}
    file.write_text(json.dumps({"base": str(tiny_run), "seeds": [0, 1], "matrix": matrix}))

    def figures(name: str, workforce: Workforce) -> list[Any]:
        rows = tmp_path / f"{name}.jsonl"
        study = run_experiment(
            file, tmp_path / name, rows, Progress(StringIO()), workforce=workforce
        )
        return [
            (x["cell"], {k: v for k, v in x["figures"].items() if k != "seconds"})
            for x in study.rows
        ]

    assert figures("ray", TWO) == figures("alone", Workforce(asked_threads=1))
    assert list((tmp_path / "ray").glob("worker-*.log"))


def test_an_interrupt_reaches_the_cells(tmp_path: Path) -> None:
    patient_cell = importlib.import_module("scoring_workers").patient_cell
    cells = [{"folder": str(tmp_path), "n": n} for n in range(4)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        _wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread, told = threading.Thread(target=interrupt), list[str]()
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), TWO.for_cells(patient_cell, False) as crew:
            list(in_workers(cells, crew, told.append))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert sorted(x.name for x in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert len(list(tmp_path.glob("begun-*"))) == 2
    assert told == ["stopping the workers after their step; once more stops them at once"]


def test_a_signal_ends_the_actors_and_a_resumed_run_ends_as_one_that_was_not_stopped(
    tiny_run: Path, tmp_path: Path
) -> None:
    short = (
        "pruning.refit=false",
        "evaluation.tasks=[]",
        "evaluation.controls=[]",
        "evaluation.speed={batch: 1, prompt_tokens: 8, new_tokens: 2, repeats: 1}",
    )
    settings = ["search.evaluations=150", "search.population=6", *short]
    options = [word for x in settings for word in ("--set", x)]
    stopped, on_ray = tmp_path / "stopped", ("--workers", "ray", "--threads", "1")
    _stop(stopped, ["compress", str(tiny_run), *options, "--out", str(stopped), *on_ray])
    begun = len((stopped / "candidates.jsonl").read_text().splitlines())
    resumed = CliRunner().invoke(main, ["resume", str(stopped), *on_ray], catch_exceptions=False)
    assert resumed.exit_code == 0, resumed.output
    assert f"resumed: {begun} plans are scored already" in resumed.stderr
    assert (stopped / "report.html").is_file()
    _, ledger = _search(tiny_run, tmp_path / "alone", Workforce(asked_threads=1), *settings)
    assert len(ledger) > begun
    assert _ledger(stopped) == ledger


def _stop(folder: Path, arguments: list[str]) -> None:
    """Run the command, send its group SIGTERM once it has scored plans, and see it end."""
    command = [sys.executable, "-m", "selfpruner.cli", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def has_scored() -> bool:
        assert process.poll() is None, process.communicate()[1]
        ledger = folder / "candidates.jsonl"
        return ledger.exists() and bool(ledger.read_text())

    _wait_for(has_scored)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("_Actor" in " ".join(x.cmdline()) for x in children)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"`selfpruner resume {folder} --workers ray --threads 1` goes on" in said
    _wait_for(lambda: not any(x.is_running() and x.status() != "zombie" for x in children))


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)
