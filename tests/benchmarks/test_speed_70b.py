"""The 70B speed benchmark at its small size: its counts, its decoder, its figures."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import fused_decoder, fused_kernels, speed_70b
from benchmarks.fused_decoder import FusedDecoder
from benchmarks.speed_70b import SHAPES, Cache, Case, Decoder, Shared, Widths

SMALL = SHAPES["small"]
CPU = torch.device("cpu")
PLAN = speed_70b.varied_plan(SMALL, 0.7)
DECODE = Case("decode", 3, 20, 1)
PREFILL = Case("prefill", 2, 24, 1)


def test_the_dense_shape_is_llama_2_70b() -> None:
    shape = SHAPES["70b"]
    blocks = shape.passes * shape.block_parameters(speed_70b.dense_plan(shape))
    norms = (2 * shape.layers * shape.passes + 1) * shape.hidden
    assert blocks + norms + 2 * shape.hidden * shape.vocabulary == 68_976_648_192


@pytest.mark.parametrize("scale", SHAPES)
def test_plans_are_aligned_and_as_large_as_they_may_be(scale: str) -> None:
    shape = SHAPES[scale]
    dense = shape.block_parameters(speed_70b.dense_plan(shape))
    for name, share, plan in speed_70b.plans(shape):
        missing = share * dense - shape.block_parameters(plan)
        assert -1 <= missing < shape.mlp_parameters(shape.step)
        assert all(x.mlp % shape.step == 0 and 0 < x.mlp <= shape.mlp for x in plan)
        assert all(0 < x.kv_heads <= shape.kv_heads for x in plan)
        widths = {x.mlp for x in plan}
        uneven = max(widths) - min(widths)
        assert uneven <= shape.step if name == "uniform" else uneven >= shape.mlp // 4


def test_bytes_are_those_of_the_tensors_that_a_step_reads() -> None:
    decoder = Decoder(SMALL, PLAN, Shared(SMALL, CPU))
    read = [*decoder.shared.head.parameters(), *decoder.shared.norm.parameters()]
    for _ in range(SMALL.passes):
        read += [p for layer in decoder.layers for p in layer.parameters()]
        read += Cache(SMALL, PLAN, DECODE, CPU).layers
    assert speed_70b.step_bytes(SMALL, PLAN, DECODE) == sum(x.nbytes for x in read)


def test_flops_are_those_that_torch_counts() -> None:
    """Matrix products by torch's own counter; causal attention query by query."""
    decoder = Decoder(SMALL, PLAN, Shared(SMALL, CPU))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        decoder.prepared(PREFILL)()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in counts.items() if "attention" not in str(kind))
    heads = [x.kv_heads * SMALL.q_per_group for x in PLAN]
    attention = sum(
        2 * 2 * SMALL.head_dim * (query + 1) * n for n in heads for query in range(PREFILL.tokens)
    )
    expected = products + SMALL.passes * PREFILL.batch * attention
    assert speed_70b.prefill_flops(SMALL, PLAN, PREFILL) == expected


@torch.no_grad()
def test_the_decoder_is_stock_llama_and_decodes_what_it_prefills() -> None:
    shape = replace(SMALL, passes=1)
    dense = speed_70b.dense_plan(shape)
    decoder = Decoder(shape, dense, Shared(shape, CPU))
    stock = LlamaForCausalLM(speed_70b._config(shape, dense[0])).to(torch.bfloat16).eval()
    stock.model.layers = torch.nn.ModuleList(decoder.layers)
    stock.model.embed_tokens, stock.lm_head = decoder.shared.embedding, decoder.shared.head
    ids = torch.randint(shape.vocabulary, (2, 9))
    expected = stock(input_ids=ids).logits[:, -1:]

    whole, part = (Case("prefill", 2, n, 1) for n in (9, 8))
    filled = [Cache(shape, dense, case, CPU) for case in (whole, part)]
    for forward in (decoder.forward, decoder.fused_forward):
        found = forward(ids, torch.arange(9)[None], filled[:1])
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    decoder.forward(ids[:, :8], torch.arange(8)[None], filled[1:])
    cache = Cache(shape, dense, Case("decode", 2, 8, 1), CPU)
    for buffer, kept in zip(cache.layers, filled[1].layers, strict=True):
        buffer[..., :8, :] = kept
    for forward in (decoder.forward, decoder.fused_forward):
        step = forward(ids[:, 8:], torch.arange(8, 9)[None], [cache])
        torch.testing.assert_close(step, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(cache.layers[-1], filled[0].layers[-1], rtol=0.05, atol=0.05)


def test_the_small_run_reports_every_plan_and_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    speed_70b.main(["--device", "cpu", "--scale", "small", "--out", str(file)])
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 18
    assert max(result["disagreements"].values()) < 0.05
    assert result["skipped"] == []
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["pruned_ms"])
        assert row["reached"] == pytest.approx(row["speedup"] / row["ideal"])
        assert 1.2 < row["ideal"] < 2.01
        plan = next(
            p for n, s, p in speed_70b.plans(SMALL) if (n, s) == (row["plan"], row["share"])
        )
        assert row["kept"] == speed_70b.kept(SMALL, plan)
    assert capsys.readouterr().out.count("| uniform | 70.0 % | fused | decode |") == 2


def test_out_of_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    speed_70b.main(["--device", "cpu", "--scale", "small", "--seconds", "0"])
    assert capsys.readouterr().out.count("out of time") == 18


def test_a_row_by_hand() -> None:
    plan = (Widths(2, 512),) * SMALL.layers
    row = speed_70b._row(SMALL, plan, DECODE, ([4.0, 4.0, 8.0], [2.0, 2.0, 2.0]))
    assert (row["dense_ms"], row["pruned_ms"], row["speedup"]) == (4000.0, 2000.0, 2.0)
    assert row["quartiles"] == [2.0, 4.0]


@pytest.mark.parametrize("module", [speed_70b, fused_decoder, fused_kernels])
def test_it_needs_torch_and_transformers_alone(module: ModuleType) -> None:
    """Parse the imports: the folder is copied to machines without this project."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # triton comes with torch where there is a GPU.
    assert names - sys.stdlib_module_names <= {"benchmarks", "torch", "transformers", "triton"}


def test_gains_of_norms_are_folded_into_what_follows_them() -> None:
    shared = Shared(SMALL, CPU)
    stock = Decoder(SMALL, PLAN, shared).layers
    ids, positions = torch.randint(SMALL.vocabulary, (2, 7)), torch.arange(7)[None]
    case = Case("prefill", 2, 7, 1)
    with torch.no_grad():
        for layer in stock:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.uniform_(0.5, 2.0)
        hidden, angles = shared.embedding(ids), shared.rotary(shared.embedding(ids), positions)
        before = stock[0](
            hidden, position_ids=positions, past_key_values=_cache(case), use_cache=True,
            position_embeddings=angles,
        )  # fmt: skip
        fused = FusedDecoder(stock, shared.norm, shared.head)
        residual, delta = fused.layers[0].forward(
            hidden, torch.zeros_like(hidden), angles, _cache(case), fused.between
        )
    assert stock[0].input_layernorm.weight.eq(1).all()
    torch.testing.assert_close(residual + delta, before, rtol=0.05, atol=0.05)


def _cache(case: Case) -> Cache:
    return Cache(SMALL, PLAN, case, CPU)


def test_kernels_do_what_torch_does() -> None:
    """A decode step by Triton's interpreter, where Triton is installed, in single precision."""
    pytest.importorskip("triton")
    program = """
import torch
from benchmarks import speed_70b as speed
speed.DTYPE = torch.float32
shape, cpu = speed.SHAPES["small"], torch.device("cpu")
for share, batch, tokens in ((1.0, 1, 70), (0.5, 3, 127)):
    plan = speed.varied_plan(shape, share) if share < 1 else speed.dense_plan(shape)
    case = speed.Case("decode", batch, tokens, 1)
    with torch.no_grad():
        decoder = speed.Decoder(shape, plan, speed.Shared(shape, cpu))
        ids, at = torch.randint(shape.vocabulary, (batch, 1)), torch.tensor([[tokens]])
        caches = [[speed.Cache(shape, plan, case, cpu) for _ in range(2)] for _ in range(2)]
        for old, new in zip(*caches):
            new.layers = [x.clone() for x in old.layers]
        stock = decoder.forward(ids, at, caches[0])[:, 0]
        hidden = decoder.shared.embedding(ids)
        found = decoder.fused._step(hidden[:, 0], decoder.shared.rotary(hidden, at), caches[1])
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    for old, new in zip(*caches):
        torch.testing.assert_close(new.layers, old.layers, rtol=1e-4, atol=1e-4)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
