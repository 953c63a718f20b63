"""The profile of a tiny model: unseen plans, errors by hand, one JSON file and one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from pruning.loading import architecture_of
from pruning.plan import Grid, LayerPlan, Plan
from selfpruner import profile as profiles
from selfpruner import profiling
from selfpruner.cli import main
from selfpruner.config import CONFIGS, load_config
from selfpruner.latency_table import Detail, LatencyTable, Timing, Workload
from selfpruner.profile import Profile, Row
from selfpruner.profiling import random_plans
from selfpruner.progress import Progress
from selfpruner.workbench import prepare

PLAN = Plan((LayerPlan(1, 2, 8),))


def test_a_configuration_is_timed_at_the_load_of_its_own_budget() -> None:
    budget = ("budget={speedup: 1.4, phase: prefill, batch: 8, tokens: 64}",)
    own = load_config(CONFIGS / "demo.yaml", settings=budget).workload
    assert Timing().of(own) == Workload("prefill", 8, 64)
    assert Timing(phase="decode", tokens=32).of(own) == Workload("decode", 8, 32)


def test_the_command_measures_prints_and_writes(tiny_run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(
        main,
        [
            "profile",
            str(tiny_run),
            "--phase",
            "decode",
            "--tokens",
            "8",
            "--plans",
            "10",
            "--out",
            str(tmp_path / "p"),
        ],
        catch_exceptions=False,
    )
    assert said.exit_code == 0, said.output
    told = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert len(told["plans"]) == 10
    errors = [abs(x["predicted"] / x["measured"] - 1) for x in told["plans"]]
    assert told["median_error"] == pytest.approx(np.median(errors))
    assert told["worst_error"] == pytest.approx(max(errors))
    assert told["conditions"]["dtype"] == "float32"
    assert told["table"]["workload"] == {"phase": "decode", "batch": 1, "tokens": 8}
    assert f"median error {100 * np.median(errors):.1f} %" in " ".join(said.output.split())
    page = (tmp_path / "p" / "profile.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=\"http|<script|@import", page)
    for row in told["plans"]:
        assert f"<td>{row['measured']:.2f}</td>" in page


def test_plans_are_unseen(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None calibrated the table, none is one of its uniform models, and a second look costs none
    of the table's measurements."""
    monkeypatch.setenv("SELFPRUNER_CACHE", str(tmp_path))
    calls: list[list[Plan]] = []

    def timed(
        _: Any, plans: list[Plan], _workload: Any, detail: Detail, on_visit: Any
    ) -> NDArray[np.float64]:
        calls.append(plans)
        row = [2 + sum(x.kv_groups + 0.1 * x.mlp_channels for x in p.layers) for p in plans]
        on_visit()
        return np.array([row] * detail.rounds)

    monkeypatch.setattr(profiling, "timed", timed)
    monkeypatch.setattr(profiles, "timed", timed)
    config = load_config(tiny_run)
    bench = prepare(config, Progress())
    work = Workload("decode", 1, 8)
    found = profiles.profile(bench.model, "tiny", bench.grid, work, 12, Progress())
    table_plans, checked = calls
    assert len({x.plan for x in found.rows}) == 12
    assert not {x.plan for x in found.rows} & set(table_plans)
    assert checked == [Plan.dense(bench.architecture), *(x.plan for x in found.rows)]
    assert (found.median_error, found.repeatability) == (pytest.approx(0), 0)
    profiles.profile(bench.model, "tiny", bench.grid, work, 12, Progress())
    assert calls[2:] == [checked]


def test_errors_by_hand() -> None:
    """Errors of +10 %, -20 % and +30 %; the dense model itself is predicted 10 % too slow."""
    table = LatencyTable(
        Workload("decode", 1, 8), "kv_group", LayerPlan(1, 2, 8), 1, 1.0, ((1, 1.0),), ((8, 1.0),)
    )
    rows = tuple(Row(PLAN, 1, 10 * (1 + e), 10.0) for e in (0.1, -0.2, 0.3))
    found = Profile("m", {}, table, Row(PLAN, 1, 11.0, 10.0), rows, 0.0)
    assert found.median_error == pytest.approx(0.2)
    assert found.worst_error == pytest.approx(0.3)
    assert found.speedup_error == pytest.approx(np.median([0, 1.1 / 0.8 - 1, 1 - 1.1 / 1.3]))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/Llama-3.2-1B", "Llama-3.2-1B-decode-1x8"),
        ("models/small.gguf", "small.gguf-decode-1x8"),
        ("configs/demo.yaml", "demo-decode-1x8"),
    ],
)
def test_models_of_different_names_have_folders_of_their_own(source: str, name: str) -> None:
    found = profiles.default_folder(source, Workload("decode", 1, 8))
    assert found == Path("runs/profiles") / name


def test_a_streamed_configuration_is_refused(tmp_path: Path, tiny_run: Path) -> None:
    config = tmp_path / "streamed.yaml"
    config.write_text(f"model: {tiny_run}\nmemory: streamed\ndata: {{choices: 0}}\n")
    said = CliRunner().invoke(main, ["profile", str(config)])
    assert said.exit_code == 2
    assert "memory: streamed, allowed whole" in " ".join(said.output.split())


def test_too_few_plans_are_refused(tiny_run: Path) -> None:
    said = CliRunner().invoke(main, ["profile", str(tiny_run), "--plans", "3"])
    assert said.exit_code == 2
    assert "--plans: got 3, allowed at least 10" in said.output


def test_a_grid_without_enough_plans_is_refused(tiny_run: Path) -> None:
    architecture = architecture_of(load_config(tiny_run).model)
    grid = Grid.of(architecture, 48, prune_attention=False)
    with pytest.raises(ValueError, match="has not as many different random plans"):
        profiles._unseen(grid, 3, 10, Detail.coarse())
    assert random_plans(grid, 3, 2, seed=0)[0] == Plan.dense(architecture)
