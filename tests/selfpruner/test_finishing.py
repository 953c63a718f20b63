"""Finishing: which text each step sees, and what is left where a refit does not help."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning.export import export
from pruning.plan import Plan
from pruning.slicing import sliced
from selfpruner import finishing, judge, pipeline
from selfpruner.arena import Arena
from selfpruner.config import load_config
from selfpruner.fitness import Fitness
from selfpruner.progress import Progress
from selfpruner.results import Refit
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import prepare
from selfpruner.workforce import threads_set

Opened = tuple[Arena, RunFolder]
Drawing = Callable[[Arena, int], list[Plan]]


def test_a_refit_is_kept_where_it_lowers_the_fitness() -> None:
    assert finishing._judged(1.0, 0.5).kept
    assert not finishing._judged(0.5, 1.0).kept
    assert not finishing._judged(1.0, 1.0).kept
    assert finishing._judged(math.nan, 2.0).kept
    assert not finishing._judged(1.0, math.nan).kept
    assert not finishing._judged(math.nan, math.nan).kept


@pytest.mark.parametrize("kept", [True, False])
def test_a_refit_that_is_not_kept_leaves_the_sliced_weights(
    opened: Opened, plans_of: Drawing, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    arena, (plan,) = opened[0], plans_of(opened[0], 1)
    monkeypatch.setattr(finishing, "_judged", lambda a, b: Refit(kept=kept, before=a, after=b))
    quiet = Progress(StringIO())
    with threads_set(1):
        found = finishing.finish(arena.bench, arena.prunable, {"x": plan}, arena.selection, quiet)
        before = sliced(arena.prunable, plan).state_dict()
    model, refit = found["x"]
    assert refit is not None
    assert refit.before != refit.after
    is_same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert is_same is not kept


def test_the_search_and_the_selection_are_scored_on_their_own_texts(
    opened: Opened, plans_of: Drawing
) -> None:
    arena, (plan,) = opened[0], plans_of(opened[0], 1)
    bench = arena.bench
    found = [
        Fitness(arena.prunable, bench.model, bench.family, bench.config.fitness, x, batch_size=2)
        for x in (bench.texts.search, bench.texts.select)
    ]
    with threads_set(1):
        own, fresh = (x([plan], range(4)) for x in found)
        assert (arena.score([plan], range(4)) == own).all()
        assert (arena.selection([plan], range(4)) == fresh).all()
    assert (own != fresh).any()


def test_the_refit_sees_calibration_text_and_the_perplexity_that_of_the_report(
    opened: Opened, plans_of: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, (plan,) = opened[0], plans_of(opened[0], 1)
    seen: dict[str, Any] = {}

    def refit(*args: Any, **options: Any) -> None:
        seen["refit"] = args[4]
        return original(*args, **options)

    def perplexities(*args: Any) -> dict[str, float]:
        seen["report"] = args[2]
        return judged(*args)

    original, judged = finishing.refit, judge.perplexities
    monkeypatch.setattr(finishing, "refit", refit)
    monkeypatch.setattr(judge, "perplexities", perplexities)
    quiet = Progress(StringIO())
    with threads_set(1):
        found = finishing.finish(arena.bench, arena.prunable, {"x": plan}, arena.selection, quiet)
        finishing.judged_controls(arena.bench, found, quiet)
    assert seen["refit"] is arena.bench.texts.calibrate
    assert seen["report"] is arena.bench.texts.report


def test_an_export_that_differs_in_one_number_is_found(
    opened: Opened, plans_of: Drawing, tmp_path: Path
) -> None:
    arena, (plan,) = opened[0], plans_of(opened[0], 1)
    bench = arena.bench
    pruned = sliced(arena.prunable, plan)
    export(pruned, bench.tokenizer, tmp_path, torch.float32)
    pipeline._checked(pruned, tmp_path, bench)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="differs from the one in memory"):
        pipeline._checked(pruned, tmp_path, bench)


def test_a_run_is_checked_before_what_it_replaces_is_gone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_run)
    RunFolder.create(tmp_path / "run", config).candidates.touch()
    folder = RunFolder.create(tmp_path / "run", config, replace=True)
    before, called = tmp_path / ".run.replaced", []
    assert before.is_dir()
    for name in ("check_words_and_drivers", "_check_items", "_check_disk"):
        monkeypatch.setattr(
            pipeline, name, lambda *_, name=name: called.append((name, before.is_dir()))
        )

    def choose(*_: Any) -> None:
        raise RuntimeError("begun")

    monkeypatch.setattr(pipeline, "_choose", choose)
    with pytest.raises(RuntimeError, match="begun"):
        pipeline.compress(config, folder, Progress(StringIO()))
    assert called == [
        ("check_words_and_drivers", True),
        ("_check_items", True),
        ("_check_disk", True),
    ]
    assert not before.exists()


@pytest.mark.parametrize(
    ("asked", "needed"), [("{memory: 40000}", 40_000), ("{parameters: 0.5}", 36_160)]
)
def test_the_disk_needs_room_for_what_the_budget_leaves(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, needed: int
) -> None:
    """Two bytes a weight: 23,040 of the blocks, 6,560 others with the correction biases."""
    config = load_config(tiny_run, settings=[f"budget={asked}"])
    folder = RunFolder.create(tmp_path / "run", config)
    bench = prepare(config, Progress(StringIO()))
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    pipeline._check_disk(bench, folder)
    free.free -= 1
    with pytest.raises(ValueError, match="the pruned model needs 0 MB"):
        pipeline._check_disk(bench, folder)
