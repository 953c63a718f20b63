"""Workers of one run: each holds the ranked model, and all mean the same ranking."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path

import torch

from selfpruner.arena import Arena
from selfpruner.blocks import Block
from selfpruner.config import parse_config
from selfpruner.crew import Crew, outcomes
from selfpruner.fitness import Fitness
from selfpruner.profiling import TABLE
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.sharing import Floats, SharedFitness
from selfpruner.workbench import (
    Workbench,
    lend_ranking,
    prepare,
    resolved_device,
    resolved_dtype,
    settle_process,
)
from selfpruner.workers import take_device
from selfpruner.workforce import Workforce, threads_set


@dataclass(frozen=True)
class Post:
    """What a worker is told, so that its arena is the one of the run.

    Attributes:
        config: the run's configuration as YAML, its device and dtype resolved.
        began: text of the files in `statistics/` that an arena begins with, by name.
        threads: of torch.
        lent: the file with the ranking of a streamed run; None where each worker ranks.
    """

    config: str
    began: tuple[tuple[str, str], ...]
    threads: int
    lent: Path | None = None

    @classmethod
    def of(
        cls, bench: Workbench, folder: RunFolder, threads: int, lent: Path | None = None
    ) -> Post:
        """Return the post of the workers of a run whose arena is open."""
        facts = {
            "device": resolved_device(bench.config),
            "dtype": str(resolved_dtype(bench.config)).removeprefix("torch."),
        }
        files = (folder.order, folder.statistics / TABLE)
        began = tuple((x.name, x.read_text(encoding="utf-8")) for x in files)
        return cls(bench.config.model_copy(update=facts).to_yaml(), began, threads, lent)


def score_block(post: Post, number: int, block: Block) -> Floats:
    """Return the search fitness of a block, in worker `number`.

    Raises:
        ValueError: the ranking came out otherwise here, or the model cannot be had.
    """
    return _arena(post, number).score(block.plans, block.sequences)


@contextmanager
def opened_arena(
    bench: Workbench, folder: RunFolder, progress: Progress, workforce: Workforce
) -> Iterator[Arena]:
    """Yield the arena of `folder`; with workers, they score its search.

    It is opened, and its forward passes are timed, before there are any workers: nothing else
    runs then. It is opened at their number of threads, so that the ranking is theirs. In a
    streamed run it is theirs in any case: they read its cuts.

    Raises:
        ValueError: the workers cannot be had, or rank otherwise.
    """
    with threads_set(workforce.threads):
        arena = Arena.open(bench, folder, progress)
        if workforce.is_alone:
            yield arena
            return
        assert isinstance(arena.score, Fitness)
        post = Post.of(bench, folder, torch.get_num_threads(), _lent(arena))
        on_gpus = resolved_device(bench.config) == "cuda"
        with workforce.residents(partial(score_block, post), on_gpus, progress.note) as crew:
            _open_all(crew, progress)
            progress.note(f"workers: {len(crew.numbers)}, threads in each: {post.threads}")
            batch_size = bench.config.evaluation.batch_size
            score = SharedFitness(arena.score, crew, batch_size, progress.note)
            yield replace(arena, score=score)


def _lent(arena: Arena) -> Path | None:
    """Return the file in which a streamed run lends its ranking."""
    if arena.bench.scratch is None:
        return None
    path = arena.bench.scratch / "ranking.pt"
    lend_ranking((arena.prunable, arena.errors), path)
    return path


def _open_all(crew: Crew[Block, Floats], progress: Progress) -> None:
    """Have every worker open its arena."""
    nothing = Block((), (), 0, ())
    with progress.stage("workers", len(crew.numbers)) as advance:
        for _ in outcomes([nothing] * len(crew.numbers), crew, _never):
            advance()


def _never(_: Block) -> bool:
    raise ValueError("--workers: one died while it loaded the model; is there memory for all?")


@cache
def _arena(post: Post, number: int) -> Arena:
    take_device(number)
    torch.set_num_threads(post.threads)
    silent = Progress(StringIO())
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.statistics.mkdir()
        for name, text in post.began:
            (folder.statistics / name).write_text(text, encoding="utf-8")
        config = parse_config(post.config, "the run's configuration")
        settle_process(streaming=config.memory == "streamed")
        bench = prepare(config, silent, folder)
        return Arena.open(bench, folder, silent, post.lent)
