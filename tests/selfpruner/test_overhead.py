"""What the agent itself costs is timed on the search that is on file: every plan comes again."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest

from benchmarks.overhead import replayed
from selfpruner.arena import Arena
from selfpruner.config import load_config
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.searching import search
from selfpruner.workbench import prepare
from selfpruner.workforce import threads_set

SEARCHES = {
    "slopes": ("search.allocator=descent", "search.window=2"),
    "probes": ("search.allocator=guided", "search.probes=1"),
    "candidates": ("search.allocator=genetic", "search.racing={rounds: [0.25, 1], bound: 0.5}"),
}


@pytest.mark.parametrize(("filed", "settings"), SEARCHES.items(), ids=SEARCHES)
def test_a_search_on_file_comes_again(
    tiny_run: Path, tmp_path: Path, filed: str, settings: tuple[str, ...]
) -> None:
    asked = ["data.search.tokens=128", "search.evaluations=20", *settings]
    config = load_config(tiny_run, settings=asked)
    folder, progress = RunFolder.create(tmp_path / "run", config), Progress(StringIO())
    with threads_set(1):
        search(Arena.open(prepare(config, progress), folder, progress), config, folder, progress)
        assert (folder.path / f"{filed}.jsonl").stat().st_size
        assert replayed(config, folder) > 0
    candidates = folder.path / "candidates.jsonl"
    *others, last = candidates.read_text().splitlines()
    other = {**json.loads(last), "operator": "crossover"}
    candidates.write_text("\n".join([*others, json.dumps(other)]) + "\n")
    with pytest.raises(RuntimeError, match="candidates differ"):
        replayed(config, folder)


def test_a_plan_of_what_is_not_on_file_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    config = load_config(tiny_run, settings=["search.starts=[owl]"])
    with pytest.raises(ValueError, match="what owl asks of layers is not kept"):
        replayed(config, RunFolder.create(tmp_path / "run", config))
