"""Tiny random models, one with its text for whole runs in seconds, and plans for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pruning.plan import Plan
from selfpruner.arena import Arena
from selfpruner.config import load_config
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import prepare
from selfpruner.workforce import threads_set

_WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep latency tables of tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFPRUNER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a run on a model of three layers, searched without an LLM."""
    folder = tmp_path_factory.mktemp("tiny_run")
    _save_model(folder / "tiny")
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(_WORDS[3:], size=40))} for _ in range(200)]
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
        "search": {
            "allocator": "genetic",
            "population": 3,
            "crossover": 1,
            "mutate": 2,
            "evaluations": 6,
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    return folder / "base.yaml"


@pytest.fixture(scope="session")
def opened(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arena, RunFolder]:
    """Return an arena of eight search sequences in micro-batches of two, and its folder."""
    settings = ["data.search.tokens=128", "evaluation.batch_size=2"]
    config = load_config(tiny_run, settings=settings)
    folder = RunFolder.create(tmp_path_factory.mktemp("opened") / "run", config)
    progress = Progress(StringIO())
    with threads_set(1):
        return Arena.open(prepare(config, progress), folder, progress), folder


@pytest.fixture(scope="session")
def plans_of() -> Callable[[Arena, int], list[Plan]]:
    """Return what draws so many plans of an arena."""

    def drawn(arena: Arena, count: int) -> list[Plan]:
        rng, grid = np.random.default_rng(0), arena.bench.grid
        levels = rng.integers(0, (len(grid.attention), len(grid.mlp)), (count, 3, 2)).tolist()
        return [grid.plan([(a, m) for a, m in row]) for row in levels]

    return drawn


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the modules beside the tests found, here and by processes that are spawned."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], PreTrainedModel]:
    return _model


def _model(family: str) -> PreTrainedModel:
    """Return a random model of three layers, two KV groups of two heads and 48 channels each."""
    config = AutoConfig.for_model(
        family,
        vocab_size=len(_WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def _save_model(folder: Path) -> None:
    _model("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
