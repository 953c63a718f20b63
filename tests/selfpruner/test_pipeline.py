"""The whole way on real weights, at its smallest: each file of the contract, a model that loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid, Plan
from selfpruner import pipeline
from selfpruner.config import CONFIGS, load_config
from selfpruner.progress import Progress
from selfpruner.results import Results
from selfpruner.run_folder import RunFolder

pytestmark = pytest.mark.real

SMALL = (
    "data.calibrate.tokens=2048",
    "data.search.tokens=512",
    "data.select.tokens=512",
    "data.report=[{source: passages, tokens: 1024, length: 256}]",
    "data.choices=4",
    "search.evaluations=6",
    "search.population=4",
    "search.crossover=1",
    "search.mutate=1",
    "evaluation.samples=2",
    "evaluation.controls=[uniform_mlp]",
    "evaluation.speed={batch: 1, prompt_tokens: 16, new_tokens: 2, repeats: 2}",
)

RELOAD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("agent", "evaluators", "prompts", "pruning", "selfpruner"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
print(output.shape[1] - inputs["input_ids"].shape[1], sum(p.numel() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one small run that an LLM drives."""
    config = load_config(CONFIGS / "demo.yaml", settings=SMALL)
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "small", config)
    with Progress() as progress:
        pipeline.compress(config, folder, progress)
    return folder.path


def test_every_file_of_the_contract(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "candidates.jsonl",
        "llm.jsonl",
        "checkpoints.sqlite",
        "statistics",
        "plan.json",
        "model",
        "results.json",
        "report.html",
    }
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_plan_is_within_its_budget_and_tight(run: Path) -> None:
    plan_file = json.loads((run / "plan.json").read_text())
    rows = [[x["kv_groups"], x["q_per_group"], x["mlp_channels"]] for x in plan_file["layers"]]
    architecture = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)
    grid = Grid.of(architecture, 32)
    budget = Budget.of(architecture, grid, "parameters", 0.7)
    levels = grid.levels(Plan.from_json(rows))
    assert budget.is_within(levels)
    assert budget.is_tight(levels)
    assert plan_file["budget"]["achieved"] == pytest.approx(budget.achieved(levels))
    assert len(plan_file["order_hash"]) == 16


def test_results_tell_what_the_ledger_holds(run: Path) -> None:
    results = Results.load(run / "results.json")
    lines = (run / "candidates.jsonl").read_text().splitlines()
    # Four plans and a last one; two sequences are one window, on which the first plan is known.
    assert results.search.evaluations == len(lines) == 5
    assert results.search.equivalents == 5
    assert results.search.llm_calls == len((run / "llm.jsonl").read_text().splitlines()) > 0
    assert results.model.parameters_dense == 134_515_008
    assert results.model.parameters_pruned < 104_000_000
    assert results.quality.pruned.perplexity["passages"] is not None
    assert set(results.controls) == {"uniform_mlp"}
    # Which side is which: what was pruned costs less and predicts worse.
    dense, pruned = results.quality.dense, results.quality.pruned
    assert dense.perplexity["passages"] < pruned.perplexity["passages"]
    assert results.macs.dense > results.macs.pruned


def test_the_model_loads_and_speaks_without_this_project(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(run / "model", folder)
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    tokens, parameters = done.stdout.split()[-2:]
    assert int(tokens) == 20
    assert int(parameters) == Results.load(run / "results.json").model.parameters_pruned


def test_a_disk_without_room_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_config(CONFIGS / "demo.yaml", settings=SMALL)
    RunFolder.create(tmp_path / "run", config).write_text("candidates.jsonl", "{}\n")
    folder = RunFolder.create(tmp_path / "run", config, replace=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**6))
    with Progress() as progress, pytest.raises(ValueError, match="1 MB are free") as refusal:
        pipeline.compress(config, folder, progress)
    assert "\n" not in str(refusal.value)
    folder.remove_if_unused()  # as the command does
    assert folder.candidates.is_file()
