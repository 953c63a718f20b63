"""How a ranked model runs plans, by what their cuts take."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from pruning import elastic
from pruning.elastic_layerwise import LayerwiseElastic
from selfpruner.config import load_config
from selfpruner.costs import memory
from selfpruner.costs.memory import MemoryModel
from selfpruner.costs.work import Running
from selfpruner.progress import Progress
from selfpruner.workbench import prepare, rank

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
