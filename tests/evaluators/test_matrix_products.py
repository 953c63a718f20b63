from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers import LlamaForCausalLM

from evaluators.matrix_products import product_seconds
from evaluators.memory import cached_bytes, step_bytes

Factory = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_is_called_once(tiny_llama: Factory, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    seen: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.append((name, given[0].shape[0]))
            )
    assert product_seconds(model, 3, 5, seed=0) > 0
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    assert [name.split(".")[-1] for name, _ in seen[:7]] == [f"{x}_proj" for x in kinds]
    assert [rows for _, rows in seen] == [15] * 14 + [3]
    assert seen[-1][0] == "lm_head"


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_weights_and_cache(tiny_llama: Factory, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    # 16 hidden, 2 layers, 4 heads and 2 groups of 4, MLP 32, vocabulary 128, float32.
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16
    weights = 4 * (2 * layer + 16 + 16 * 128)
    assert cached_bytes(model) == 4 * 2 * 2 * 2 * 4
    assert step_bytes(model, 3, 10) == weights + 3 * 10 * 128
