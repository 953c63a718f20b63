"""The 70B speed benchmark at its small size: its counts, its decoder, its figures."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import speed_70b
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
    found = decoder.forward(ids, torch.arange(9)[None], filled[:1])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    decoder.forward(ids[:, :8], torch.arange(8)[None], filled[1:])
    cache = Cache(shape, dense, Case("decode", 2, 8, 1), CPU)
    for buffer, kept in zip(cache.layers, filled[1].layers, strict=True):
        buffer[..., :8, :] = kept
    step = decoder.forward(ids[:, 8:], torch.arange(8, 9)[None], [cache])
    torch.testing.assert_close(step, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(cache.layers[-1], filled[0].layers[-1], rtol=0.05, atol=0.05)


def test_the_small_run_reports_every_plan_and_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    speed_70b.main(["--device", "cpu", "--scale", "small", "--out", str(file)])
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 9
    assert result["skipped"] == []
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["pruned_ms"])
        assert row["reached"] == pytest.approx(row["speedup"] / row["ideal"])
        assert 1.2 < row["ideal"] < 2.01
        plan = next(
            p for n, s, p in speed_70b.plans(SMALL) if (n, s) == (row["plan"], row["share"])
        )
        assert row["kept"] == speed_70b.kept(SMALL, plan)
    assert capsys.readouterr().out.count("| uniform | 70.0 % | decode |") == 2


def test_out_of_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    speed_70b.main(["--device", "cpu", "--scale", "small", "--seconds", "0"])
    assert capsys.readouterr().out.count("out of time") == 9


def test_a_row_by_hand() -> None:
    plan = (Widths(2, 512),) * SMALL.layers
    row = speed_70b._row(SMALL, plan, DECODE, ([4.0, 4.0, 8.0], [2.0, 2.0, 2.0]))
    assert (row["dense_ms"], row["pruned_ms"], row["speedup"]) == (4000.0, 2000.0, 2.0)
    assert row["quartiles"] == [2.0, 4.0]


def test_it_needs_torch_and_transformers_alone() -> None:
    """Parse the imports: the file is copied to machines without this project."""
    tree = ast.parse(Path(str(speed_70b.__file__)).read_text())
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
    assert names - sys.stdlib_module_names == {"torch", "transformers"}
