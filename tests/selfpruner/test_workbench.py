"""How a ranked model runs plans, by what their cuts take."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from agent.allocators import uniform
from pruning import elastic
from pruning.curvature import stream_curvature
from pruning.elastic import ElasticModel
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.export import export
from pruning.loading import load
from pruning.ranking import order_hash
from selfpruner.config import CONFIGS, load_config
from selfpruner.costs import memory
from selfpruner.costs.memory import MemoryModel
from selfpruner.costs.work import Running
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import prepare, rank, usable_device

# Output projections of a dense plan: three layers, 32 + 48 columns of 32 numbers in float32.
DENSE = 3 * (32 + 48) * 32 * 4


@pytest.mark.parametrize(
    ("reconstruction", "room", "layerwise"),
    [
        ("least_squares", DENSE, False),
        ("least_squares", DENSE - 1, True),
        ("bias", DENSE - 1, False),
    ],
)
def test_cuts_that_take_solving_and_do_not_fit_go_layer_by_layer(
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    reconstruction: str,
    room: int,
    layerwise: bool,
) -> None:
    settings = [f"pruning.reconstruction={reconstruction}", "budget.parameters=1.0"]
    config = load_config(tiny_run, settings=settings)
    bench = prepare(config, Progress(StringIO()))
    monkeypatch.setattr(elastic, "CACHE_BYTES", room)
    monkeypatch.setattr(memory, "CACHE_BYTES", room)
    prunable, _ = rank(bench, Progress(StringIO()))
    assert isinstance(prunable, LayerwiseElastic) is layerwise
    running = Running(bench.architecture, "float32")
    assert MemoryModel(config, running, running, 1).caches_plans is not layerwise


@pytest.mark.parametrize("setting", ["ridge=0.1", "calibration=auto", "statistics=sequential"])
def test_cuts_are_measured_by_curvature_where_it_is_asked_for(tiny_run: Path, setting: str) -> None:
    """On whole sequences from the start of the calibration text: 70 tokens are two of 32."""
    settings = [f"pruning.{setting}", "search.allocator=guided", "data.length=32"]
    configs = [
        load_config(tiny_run, settings=[*settings, f"pruning.fisher_tokens={tokens}"])
        for tokens in (70, 0)
    ]
    bench = prepare(configs[0], Progress(StringIO()))
    progress = Progress(StringIO())
    prunable, measured = rank(bench, progress)
    assert "curvature" in progress.seconds
    text = bench.texts.calibrate[:2]
    curvature = stream_curvature(bench.model, bench.family, text, seed=bench.config.seed)
    ranked = ElasticModel.rank(
        bench.model,
        bench.family,
        bench.architecture,
        bench.texts.calibrate,
        bench.recipe,
        batch_size=bench.config.evaluation.batch_size,
        curvature=curvature,
    )
    expected = [x.cut_errors(bench.grid, y) for x, y in zip(ranked.layers, curvature, strict=True)]
    flat = [x for layer in measured for block in layer for x in block]
    assert flat == pytest.approx([x for layer in expected for y in layer for x in y], rel=1e-4)
    plan = bench.grid.plan(uniform(bench.space))
    if setting != "statistics=sequential":
        assert order_hash(prunable.orders(plan)) == order_hash(ranked.orders(plan))
    progress = Progress(StringIO())
    _, plain = rank(replace(bench, config=configs[1]), progress)
    assert "curvature" not in progress.seconds
    assert flat != [x for layer in plain for block in layer for x in block]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: got cuda; torch .* finds no GPU here"):
        usable_device(load_config(CONFIGS / "demo.yaml", settings=("device=cuda",)))
    assert usable_device(load_config(CONFIGS / "demo.yaml")) == "cpu"


@pytest.mark.parametrize("memory", ["whole", "streamed"])
def test_reported_texts_beyond_the_window_are_refused_before_the_search(
    tiny_run: Path, make_model: Callable[[str], PreTrainedModel], tmp_path: Path, memory: str
) -> None:
    """A streamed run judges layer by layer, which knows no window; one in memory knows it."""
    model = make_model("mistral")
    model.config.sliding_window = 16
    tokenizer = load(str(tiny_run.parent / "tiny"), torch.float32)[1]
    export(model, tokenizer, tmp_path / "m", model.dtype)
    source = tiny_run.parent / "text.jsonl"
    report = json.dumps([{"source": str(source), "tokens": 64, "length": 32}])
    settings = [f"memory={memory}", f"data.report={report}"]
    config = load_config(tiny_run, model=str(tmp_path / "m"), settings=settings)
    folder = RunFolder.create(tmp_path / "run", config)
    message = r"data\.report\.0\.length: got 32 tokens, this model attends within a window of 16"
    with pytest.raises(ValueError, match=message) if memory == "streamed" else nullcontext():
        prepare(config, Progress(StringIO()), folder)
