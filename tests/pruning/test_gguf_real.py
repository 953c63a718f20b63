"""A really pruned real model: llama.cpp says, token for token, what transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.export import export
from pruning.families import family_of
from pruning.gguf import write_gguf
from pruning.loading import load
from pruning.plan import Grid
from pruning.registration import register_with_transformers
from pruning.slicing import sliced

pytestmark = pytest.mark.real

NEW_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees",
    "The three primary colours are",
    "In 1969, Neil Armstrong",
    "A recipe for pancakes: take 2 eggs,",
    "The opposite of hot is",
    "Dear Sir or Madam,",
    "2, 4, 8, 16, 32,",
    "Photosynthesis is the process by which",
    "The largest planet of the solar system",
    "To be, or not to be, that is",
    "My favourite book is",
    "The stock market fell by 3.5 % on Monday",
    "Q: Why is the sky blue?\nA:",
    "<|im_start|>user\nWhat is a noun?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, déjà vu:",
    "Step 1: Open the door.\nStep 2:",
    "The quick brown fox",
]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """The packaged model without a fifth of its channels and some heads, and its folder."""
    dense, tokenizer = load("smollm2-135m-instruct", torch.float32)
    family, architecture = family_of(dense)
    texts = [tokenizer(x * 20).input_ids[:64] for x in PROMPTS]
    tokens = torch.tensor([x for x in texts if len(x) == 64])
    recipe = Recipe("wifv", "least_squares", 0.1)
    elastic = ElasticModel.rank(dense, family, architecture, tokens, recipe)
    grid, rng = Grid.of(architecture, 32), np.random.default_rng(0)
    attention, mlp = len(grid.attention) - 1, len(grid.mlp) - 1
    plan = grid.plan(
        [(attention - (i % 7 == 3), mlp - int(rng.integers(0, 20))) for i in range(30)]
    )
    folder = tmp_path_factory.mktemp("pruned") / "model"
    return export(sliced(elastic, plan), tokenizer, folder, torch.float32), folder


def _greedy(model: PreTrainedModel, ids: list[int], banned: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else an <|im_end|> in the prompt is padding
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=banned,
    )
    continued: list[int] = made[0, len(ids) :].tolist()
    return continued


def test_llama_cpp_says_what_transformers_says(
    pruned: tuple[PreTrainedModel, Path],
    llama_cpp: Any,
    record_property: Any,
) -> None:
    model, folder = pruned
    register_with_transformers()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(x).input_ids for x in PROMPTS]
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    expected = [_greedy(model, ids, ends) for ids in prompts]
    agreement = {}
    for dtype in ("f32", "q8_0"):
        path = folder.with_suffix(f".{dtype}.gguf")
        assert write_gguf(folder, path, dtype) == "deci"
        engine = llama_cpp(path)
        assert [engine.tokens(x) for x in PROMPTS] == prompts
        found = [engine.continued(ids, NEW_TOKENS) for ids in prompts]
        agreement[dtype] = sum(a == b for a, b in zip(found, expected, strict=True))
        record_property(f"equal_{dtype}", agreement[dtype])
        print(f"{dtype}: {agreement[dtype]} of {len(PROMPTS)} continuations are equal")
        del engine
    assert agreement["f32"] == len(PROMPTS)
