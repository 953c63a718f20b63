"""A tiny random model with its text, for whole runs in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


def _save_model(folder: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
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
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
