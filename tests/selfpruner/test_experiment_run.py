"""A whole experiment on a tiny random model: cells, budgets, workers, page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from selfpruner.cli import main

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an experiment with two budgets on a model of three layers."""
    folder = tmp_path_factory.mktemp("study")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "tiny")
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS[3:], size=40))} for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(folder / "text.jsonl")
    base = {
        "model": str(folder / "tiny"),
        "dtype": "float32",
        "device": "cpu",
        "pruning": {"step": 8},
        "data": {
            "length": 16,
            "choices": 0,
            "calibrate": {"source": source, "tokens": 256},
            "search": {"source": source, "tokens": 64},
            "select": {"source": source, "tokens": 64},
            "report": [{"source": source, "tokens": 64, "length": 16}],
        },
        "search": {"population": 3, "crossover": 1, "mutate": 2, "evaluations": 6},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    experiment = {
        "base": "base.yaml",
        "seeds": [0, 1],
        "budgets": [{"parameters": 0.7}, {"parameters": 0.5}],
        "matrix": {"search.allocator": ["genetic", "random"]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "study.yaml"


def _run(study: Path, name: str, *more: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what the command said and its rows."""
    folder = study.parent / name
    results = folder.with_suffix(".jsonl")
    arguments = ["experiment", str(study), "--out", str(folder), "--results", str(results), *more]
    said = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    return said.stdout, [json.loads(x) for x in results.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(study: Path) -> tuple[str, list[dict[str, Any]]]:
    before = torch.get_num_threads()
    ran = _run(study, "alone", "--threads", "1")
    torch.set_num_threads(before)
    return ran


def test_the_command_runs_every_cell_and_says_what_came_of_it(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    said, rows = alone
    assert [(x["cell"]["seed"], x["cell"]["budget"], x["cell"]["arm"]) for x in rows] == [
        (seed, budget, arm)
        for seed in (0, 1)
        for budget in ("parameters=0.7", "parameters=0.5")
        for arm in ("genetic", "random")
    ]
    assert "| genetic | classical | 4 |" in said
    assert "No arm asks an LLM." in said
    page = (study.parent / "alone" / "experiment.html").read_text()
    assert "8 <small>of 8</small>" in page
    # A smaller budget is a worse one: the cells were searched within their own.
    for arm in ("genetic", "random"):
        best = {
            x["cell"]["budget"]: x["figures"]["steps"][-1]["fitness"]
            for x in rows
            if x["cell"]["arm"] == arm and x["cell"]["seed"] == 0
        }
        assert best["parameters=0.5"] > best["parameters=0.7"] > 0


def test_one_model_is_ranked_once_for_all_budgets(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    del alone
    assert len(list((study.parent / "alone").rglob("order.json"))) == 1
    assert len(list((study.parent / "alone").rglob("candidates.jsonl"))) == 8


def test_two_workers_come_to_the_figures_of_one(
    study: Path, alone: tuple[str, list[dict[str, Any]]]
) -> None:
    _, rows = _run(study, "side_by_side", "--workers", "2", "--threads", "1")

    def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            json.dumps(x["cell"]): {k: v for k, v in x["figures"].items() if k != "seconds"}
            for x in rows
        }

    assert figures(rows) == figures(alone[1])
    logs = sorted(x.name for x in (study.parent / "side_by_side").glob("worker-*.log"))
    assert logs == ["worker-0.log", "worker-1.log"]


def test_a_finished_experiment_loads_nothing(
    study: Path, alone: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfpruner.experiment.prepare", lambda *_: pytest.fail("loaded a model"))
    assert _run(study, "alone") == alone
