"""Alignment: widths that suit a target, and one line where none do."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pruning.alignment import Alignment
from pruning.architecture import Architecture
from pruning.plan import Grid

LLAMA_2 = Architecture("llama", 32, 4096, 32, 32, 128, 11008, 32000, False)
LLAMA_3 = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False)
SMOLLM = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)


@pytest.mark.parametrize(
    ("target", "step"),
    [("cpu", 32), ("tensor-cores", 128), ("gguf", 256), ("vllm-tp1", 128), ("vllm-tp4", 512)],
)
def test_every_target_has_its_step(target: str, step: int) -> None:
    grid = Alignment.of(target).grid(LLAMA_3, None)
    assert grid.mlp == (*range(step, 14336, step), 14336)


def test_an_explicit_step_wins() -> None:
    for target in ("cpu", "tensor-cores", "gguf", "vllm-tp2"):
        assert Alignment.of(target).grid(LLAMA_3, 64).mlp[0] == 64


def test_one_device_takes_any_heads() -> None:
    for target in ("cpu", "tensor-cores", "vllm-tp1"):
        assert Alignment.of(target).grid(LLAMA_3, None).attention == tuple(range(1, 9))
        assert Alignment.of(target).grid(SMOLLM, None) == Grid.of(SMOLLM, Alignment.of(target).step)


def test_shards_divide_heads() -> None:
    """Four query heads a group: any number of groups makes a multiple of 4 query heads, but KV
    heads must divide 4 or be a multiple of it."""
    assert Alignment.of("vllm-tp4").grid(LLAMA_3, None).attention == (1, 2, 4, 8)
    assert Alignment.of("vllm-tp4").grid(LLAMA_2, 32).attention == tuple(range(4, 33, 4))
    by_query = Alignment.of("vllm-tp8").grid(LLAMA_3, None, "query_head")
    assert by_query.attention == (1, 2, 3, 4)  # all 8 KV heads stay
    assert Alignment.of("vllm-tp4").grid(LLAMA_3, None, prune_attention=False).attention == (8,)


def test_quantised_rows_are_whole_blocks() -> None:
    """A group of Llama 3 is 512 numbers of a row, a head of Llama 2 128: two make a K-quant's 256.

    The 576 of SmolLM2 fill no 256 even dense, but 32: groups of 192 do so too.
    """
    assert Alignment.of("gguf").grid(LLAMA_3, None).attention == tuple(range(1, 9))
    assert Alignment.of("gguf").grid(LLAMA_2, None).attention == tuple(range(2, 33, 2))
    assert Alignment.of("gguf").grid(SMOLLM, None).attention == (1, 2, 3)


@pytest.mark.parametrize(
    ("target", "architecture", "step", "message"),
    [
        ("gpu", SMOLLM, None, r"pruning\.target: got 'gpu'; allowed: cpu, tensor-cores, gguf, .*"),
        ("vllm-tp0", SMOLLM, None, r"pruning\.target: got 'vllm-tp0'; allowed: .*"),
        ("vllm-tp2", SMOLLM, None, r"pruning\.target: vllm-tp2 cannot share out 9 query heads, .*"),
        ("vllm-tp5", LLAMA_3, 64, r"pruning\.step: got 64; allowed .* vllm-tp5: multiples of 5"),
        ("vllm-tp3", LLAMA_3, 66, r"pruning\.target: vllm-tp3 cannot share out 32 query heads, .*"),
        ("gguf", LLAMA_3, 48, r"pruning\.step: got 48; allowed .* gguf: multiples of 32"),
        (
            "vllm-tp16",
            SMOLLM,
            None,
            r"pruning\.target: vllm-tp16 keeps channels in steps of 2048, .* has 1536; set .*",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    target: str, architecture: Architecture, step: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Alignment.of(target).grid(architecture, step)


def test_query_heads_go_only_where_several_share_a_kv_head() -> None:
    for target in ("cpu", "tensor-cores"):
        with pytest.raises(ValueError, match="attention_unit: got query_head, allowed for this"):
            Alignment.of(target).grid(LLAMA_2, None, "query_head")
        assert Alignment.of(target).grid(LLAMA_2, None, "query_head", prune_attention=False)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["kv_group", "query_head"]),
)
def test_every_level_can_be_served(shards: int, kv_heads: int, group: int, unit: str) -> None:
    """The rule as vLLM states it, for every layer that the grid allows."""
    assume(group > 1 or unit == "kv_group")
    heads = kv_heads * group
    architecture = Architecture("llama", 2, 256, heads, kv_heads, 32, 768, 100, True)
    try:
        grid = Alignment.of(f"vllm-tp{shards}").grid(architecture, 24 * shards, unit)  # type: ignore[arg-type]
    except ValueError:
        shared = kv_heads % shards == 0 or shards % kv_heads == 0
        assert heads % shards or not shared
        return
    assert grid.plan([(len(grid.attention) - 1, len(grid.mlp) - 1)]).layers == (grid.dense,)
    for level in range(len(grid.attention)):
        layer = grid.layer(level, 0)
        assert layer.kv_groups * layer.q_per_group % shards == 0
        assert layer.kv_groups % shards == 0 or shards % layer.kv_groups == 0
    assert all(width % shards == 0 for width in grid.mlp)
