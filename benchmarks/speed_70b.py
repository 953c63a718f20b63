"""LLaMA-2-70B shapes on one large GPU: measured speedups beside what bytes and FLOPs allow.

    python -m benchmarks.speed_70b [--out FILE.json]
    python -m benchmarks.speed_70b --device cpu --scale small    # a small shape, seconds on a CPU

Twenty distinct decoder layers with random weights run four times, each time with a KV cache of
its own: 80 layers' work from 34 GB of weights, far more than any cache on the chip holds. The
dense and one pruned model are resident together and take turns; each is one CUDA graph. They run
twice over the same weights: fused as serving engines do it (`benchmarks/fused_decoder.py`), and as
the stock layers of transformers, whose many small kernels no plan makes shorter.

Decode is one step at a fixed context; its ideal speedup is the ratio of the bytes that a step has
to read: weights (norms and head too, of the embedding no more than a few rows) and KV cache.
Prefill is one pass over a prompt that fills the cache and makes the last logits; its ideal is the
ratio of the FLOPs, half of the attention square counted because it is causal.

It needs torch and transformers alone, so that this folder runs on a machine without the project.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from benchmarks.fused_decoder import FusedDecoder

DTYPE = torch.bfloat16
# Speedups of LLaMA-2-70B by share of the block parameters kept: Self-Pruner, arXiv 2502.14413.
PUBLISHED = {0.7: 1.39, 0.5: 1.70}
TARGET = 0.95
WARMUP = 2
LEAST_REPEATS = 3
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A decoder: `layers` distinct layers run `passes` times; MLP widths come in `step`s."""

    hidden: int
    mlp: int
    kv_heads: int
    q_per_group: int
    head_dim: int
    layers: int
    passes: int
    vocabulary: int
    step: int

    def attention_parameters(self, kv_heads: int) -> int:
        """Return the parameters of q, k, v and o with `kv_heads` groups."""
        return 2 * self.hidden * self.head_dim * kv_heads * (self.q_per_group + 1)

    def mlp_parameters(self, channels: int) -> int:
        """Return the parameters of gate, up and down with `channels` channels."""
        return 3 * self.hidden * channels

    def block_parameters(self, plan: Plan) -> int:
        """Return the prunable parameters of the distinct layers under `plan`."""
        return sum(self.attention_parameters(x.kv_heads) + self.mlp_parameters(x.mlp) for x in plan)


@dataclass(frozen=True)
class Widths:
    """What one layer keeps: KV groups and MLP channels."""

    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Case:
    """What is timed; `tokens` is the prompt of a prefill, the context of a decode step."""

    phase: str
    batch: int
    tokens: int
    repeats: int
    engine: str = "fused"


Plan = tuple[Widths, ...]

SHAPES = {
    "70b": Shape(8192, 28672, 8, 8, 128, 20, 4, 32000, 256),
    "small": Shape(256, 1024, 4, 2, 32, 4, 2, 1000, 32),
}
WORK = {
    "70b": (
        Case("decode", 1, 512, 40),
        Case("decode", 16, 512, 40),
        Case("prefill", 1, 2048, 8),
    ),
    "small": (Case("decode", 1, 64, 8), Case("decode", 16, 64, 8), Case("prefill", 1, 128, 8)),
}
ENGINES = ("fused", "transformers")
CASES = {
    scale: tuple(replace(case, engine=engine) for engine in ENGINES for case in work)
    for scale, work in WORK.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every plan in every case, print the table, write the JSON where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=SHAPES, default="70b")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing starts after these")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of all figures")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: got cuda, which torch does not find; allowed here: cpu")
    result = measure(options.scale, torch.device(options.device), options.seconds)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def measure(scale: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return settings, one row per plan and case, and what was skipped with its reason."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(SEED)
    shape = SHAPES[scale]
    with torch.no_grad():
        shared = Shared(shape, device)
        dense = Decoder(shape, dense_plan(shape), shared)
        rows: list[dict[str, Any]] = []
        skipped: list[str] = []
        disagreements: dict[str, float] = {}
        for name, share, plan in plans(shape):
            if device.type == "cuda":  # the last plan's blocks are of other sizes
                torch.cuda.empty_cache()
            found, missed, gap = _plan_rows(dense, plan, CASES[scale], deadline)
            if gap is not None:
                disagreements[f"{name}, {share}"] = gap
            label = {"plan": name, "share": share, "kept": kept(shape, plan)}
            rows += [label | row for row in found]
            skipped += [f"{name}, {line}" for line in missed]
    return {
        "device": _device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": str(DTYPE).removeprefix("torch."),
        "cuda_graphs": device.type == "cuda",
        "scale": scale,
        "shape": asdict(shape),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "plans": {name: [asdict(x) for x in plan] for name, _, plan in plans(shape)},
        "disagreements": disagreements,
        "rows": rows,
        "skipped": skipped,
    }


def plans(shape: Shape) -> list[tuple[str, float, Plan]]:
    """Return what is measured: name, share of the block parameters, plan."""
    return [
        ("uniform", 0.7, uniform_plan(shape, 0.7)),
        ("uniform", 0.5, uniform_plan(shape, 0.5)),
        ("varied", 0.7, varied_plan(shape, 0.7)),
    ]


def dense_plan(shape: Shape) -> Plan:
    """Return the plan that keeps everything."""
    return (Widths(shape.kv_heads, shape.mlp),) * shape.layers


def uniform_plan(shape: Shape, share: float) -> Plan:
    """Return the largest plan within `share` whose layers differ by one MLP step at most.

    KV groups are the nearest whole number to `share`; the steps fill what they leave.
    """
    groups = [max(1, round(share * shape.kv_heads))] * shape.layers
    base, extra = divmod(_affordable_steps(shape, share, groups), shape.layers)
    steps = [base + (index < extra) for index in range(shape.layers)]
    return _plan(shape, groups, steps)


def varied_plan(shape: Shape, share: float) -> Plan:
    """Return the largest plan within `share` whose layers differ widely, at random (fixed seed)."""
    rng = random.Random(SEED)
    groups = [rng.randint(max(1, shape.kv_heads // 2), shape.kv_heads) for _ in range(shape.layers)]
    total = _affordable_steps(shape, share, groups)
    most = shape.mlp // shape.step
    appetites = [rng.uniform(0.4, 1.6) for _ in range(shape.layers)]
    steps = [1] * shape.layers
    for _ in range(total - shape.layers):
        open_layers = (i for i in range(shape.layers) if steps[i] < most)
        steps[min(open_layers, key=lambda i: steps[i] / appetites[i])] += 1
    return _plan(shape, groups, steps)


def _affordable_steps(shape: Shape, share: float, groups: Sequence[int]) -> int:
    budget = share * shape.block_parameters(dense_plan(shape))
    left = budget - sum(shape.attention_parameters(x) for x in groups)
    return int(left / shape.mlp_parameters(shape.step))


def _plan(shape: Shape, groups: Sequence[int], steps: Sequence[int]) -> Plan:
    return tuple(Widths(g, s * shape.step) for g, s in zip(groups, steps, strict=True))


def kept(shape: Shape, plan: Plan) -> float:
    """Return the share of the block parameters that `plan` keeps."""
    return shape.block_parameters(plan) / shape.block_parameters(dense_plan(shape))


def step_bytes(shape: Shape, plan: Plan, case: Case) -> int:
    """Return the bytes that one decode step has to read: weights, norms, head and KV cache."""
    norms = shape.hidden * (2 * shape.layers * shape.passes + 1)
    weights = shape.passes * shape.block_parameters(plan) + shape.hidden * shape.vocabulary + norms
    cached = 2 * shape.head_dim * sum(x.kv_heads for x in plan) * shape.passes
    return DTYPE.itemsize * (weights + case.batch * (case.tokens + 1) * cached)


def prefill_flops(shape: Shape, plan: Plan, case: Case) -> int:
    """Return the FLOPs of a prefill: two per weight and token, causal attention, last logits."""
    products = 2 * case.tokens * shape.block_parameters(plan)
    heads = sum(x.kv_heads for x in plan) * shape.q_per_group
    attention = 4 * heads * shape.head_dim * case.tokens * (case.tokens + 1) // 2
    head = 2 * shape.hidden * shape.vocabulary
    return case.batch * (shape.passes * (products + attention) + head)


class Shared:
    """What no plan prunes: embedding, rotary angles, final norm and head."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.device = device
        self.embedding = _random(nn.Embedding, device, shape.vocabulary, shape.hidden)
        self.head = _random(nn.Linear, device, shape.hidden, shape.vocabulary, bias=False)
        self.norm = _random(LlamaRMSNorm, device, shape.hidden)
        self.rotary = LlamaRotaryEmbedding(config=_config(shape, dense_plan(shape)[0])).to(device)


class Cache:
    """The KV cache of one pass, in the form that stock attention asks for (`update`).

    `key` and `value` of shape (batch, KV heads, new tokens, head_dim) are written from `start`
    on; what comes back is the cache to its end, all of which is attended to.
    """

    def __init__(self, shape: Shape, plan: Plan, case: Case, device: torch.device) -> None:
        self.start = 0 if case.phase == "prefill" else case.tokens
        length = self.start + (case.tokens if case.phase == "prefill" else 1)
        self.layers = [
            torch.randn(
                2, case.batch, x.kv_heads, length, shape.head_dim, device=device, dtype=DTYPE
            )
            for x in plan
        ]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer and return all of its keys and values."""
        keys, values = self.layers[layer_idx]
        keys[:, :, self.start :].copy_(key)
        values[:, :, self.start :].copy_(value)
        return keys, values


class Decoder:
    """A decoder of layers, each built from its own configuration, with random weights."""

    def __init__(self, shape: Shape, plan: Plan, shared: Shared) -> None:
        self.shape, self.plan, self.shared = shape, plan, shared
        self.layers = [
            _random(LlamaDecoderLayer, shared.device, _config(shape, widths), index)
            for index, widths in enumerate(plan)
        ]
        self.fused = FusedDecoder(self.layers, shared.norm, shared.head)

    def prepared(self, case: Case) -> Callable[[], object]:
        """Return what runs `case` once; on a GPU it replays one CUDA graph."""
        device = self.shared.device
        caches = [Cache(self.shape, self.plan, case, device) for _ in range(self.shape.passes)]
        new = case.tokens if case.phase == "prefill" else 1
        ids = torch.randint(self.shape.vocabulary, (case.batch, new), device=device)
        positions = torch.arange(caches[0].start, caches[0].start + new, device=device)[None]
        forward = self.forward if case.engine == "transformers" else self.fused_forward
        if device.type != "cuda":
            return lambda: forward(ids, positions, caches)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                forward(ids, positions, caches)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(ids, positions, caches)

        def replay(kept_alive: object = (ids, positions, caches, logits)) -> object:
            graph.replay()
            return kept_alive

        return replay

    def fused_forward(self, ids_BT: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Return the logits of the last position, shape (batch, 1, vocabulary)."""
        hidden_BTD = self.shared.embedding(ids_BT)
        return self.fused.forward(hidden_BTD, self.shared.rotary(hidden_BTD, positions), caches)

    def forward(self, ids_BT: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Return what `fused_forward` does, by the stock layers of transformers."""
        hidden_BTD = self.shared.embedding(ids_BT)
        angles = self.shared.rotary(hidden_BTD, positions)
        for cache in caches:
            for layer in self.layers:
                output = layer(
                    hidden_BTD,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=angles,
                )
                hidden_BTD = output if isinstance(output, Tensor) else output[0]
        logits: Tensor = self.shared.head(self.shared.norm(hidden_BTD[:, -1:]))
        return logits


def _config(shape: Shape, widths: Widths) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=widths.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.kv_heads * shape.q_per_group,
        num_key_value_heads=widths.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
    )
    # Set afterwards: the constructor wants heads that divide the hidden size, which no layer needs.
    config.num_attention_heads = widths.kv_heads * shape.q_per_group
    config._attn_implementation = "sdpa"
    return config


def _random(kind: type[nn.Module], device: torch.device, *sizes: Any, **named: Any) -> Any:
    """Return a module on the device, its matrices random and scaled to keep activations sane."""
    with torch.device("meta"):
        module = kind(*sizes, **named)
    module = module.to(DTYPE).to_empty(device=device).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.5 / parameter.shape[-1] ** 0.5)
    return module


def disagreement(decoder: Decoder, case: Case) -> float:
    """Return the largest difference of fused and stock logits, in standard deviations of them."""
    device = decoder.shared.device
    ids = torch.randint(decoder.shape.vocabulary, (case.batch, 1), device=device)
    positions = torch.tensor([[case.tokens]], device=device)
    caches = [Cache(decoder.shape, decoder.plan, case, device) for _ in range(decoder.shape.passes)]
    stock, fused = (
        call(ids, positions, copy.deepcopy(caches)).float()
        for call in (decoder.forward, decoder.fused_forward)
    )
    return float((stock - fused).abs().max() / stock.std())


def _plan_rows(
    dense: Decoder, plan: Plan, cases: Sequence[Case], deadline: float
) -> tuple[list[dict[str, Any]], list[str], float | None]:
    """Return the rows of one plan, what was skipped and why, and the plan's disagreement."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    pruned: Decoder | None = None
    gap: float | None = None
    for case in cases:
        label = f"{case.engine}, {case.phase}, batch {case.batch}, {case.tokens} tokens"
        if time.monotonic() > deadline:
            skipped.append(f"{label}: out of time")
            continue
        try:
            pruned = pruned or Decoder(dense.shape, plan, dense.shared)
            gap = disagreement(pruned, cases[0]) if gap is None else gap
            seconds = _taking_turns(dense, pruned, case, deadline)
        except torch.OutOfMemoryError:
            skipped.append(f"{label}: out of memory")
            continue
        rows.append(_row(dense.shape, plan, case, seconds))
    return rows, skipped, gap


def _taking_turns(
    dense: Decoder, pruned: Decoder, case: Case, deadline: float
) -> tuple[list[float], list[float]]:
    """Return the seconds of each repeat, dense and pruned; who is first changes every repeat."""
    calls = [dense.prepared(case), pruned.prepared(case)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-WARMUP, case.repeats):
        if repeat >= LEAST_REPEATS and time.monotonic() > deadline:
            break
        for index in (0, 1) if repeat % 2 else (1, 0):
            taken = _seconds(calls[index], dense.shared.device)
            if repeat >= 0:
                seconds[index].append(taken)
    return seconds


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _row(
    shape: Shape, plan: Plan, case: Case, seconds: tuple[list[float], list[float]]
) -> dict[str, Any]:
    work = step_bytes if case.phase == "decode" else prefill_flops
    dense_work, pruned_work = work(shape, dense_plan(shape), case), work(shape, plan, case)
    dense, pruned = (statistics.median(x) for x in seconds)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    ideal = dense_work / pruned_work
    return {
        **{key: value for key, value in asdict(case).items() if key != "repeats"},
        "repeats": len(ratios),
        "dense_ms": 1000 * dense,
        "pruned_ms": 1000 * pruned,
        "speedup": dense / pruned,
        "quartiles": [low, high],
        "ideal": ideal,
        "reached": dense / pruned / ideal,
        "unit": "TB/s" if case.phase == "decode" else "TFLOP/s",
        "dense_rate": dense_work / dense / 1e12,
        "pruned_rate": pruned_work / pruned / 1e12,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown, the published speedups and the target beside them."""
    lines = [
        f"{result['device']}, {result['dtype']}, torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}, "
        f"CUDA graphs {'on' if result['cuda_graphs'] else 'off'}; medians of interleaved repeats",
        "",
        "| plan | kept | layers | phase | batch | tokens | dense ms | pruned ms "
        "| rate, dense and pruned | speedup (quartiles) | ideal | reached | published |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for x in result["rows"]:
        low, high = x["quartiles"]
        published = f"{PUBLISHED[x['share']]:.2f}" if result["scale"] == "70b" else ""
        cells = [
            x["plan"],
            f"{100 * x['kept']:.1f} %",
            x["engine"],
            x["phase"],
            str(x["batch"]),
            str(x["tokens"]),
            f"{x['dense_ms']:.3f}",
            f"{x['pruned_ms']:.3f}",
            f"{x['dense_rate']:.3g} and {x['pruned_rate']:.3g} {x['unit']}",
            f"{x['speedup']:.3f} ({low:.3f} to {high:.3f})",
            f"{x['ideal']:.3f}",
            f"{100 * x['reached']:.1f} %",
            published,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for engine in ENGINES:
        reached = [x["reached"] >= TARGET for x in result["rows"] if x["engine"] == engine]
        lines.append(
            f"{engine}: {sum(reached)} of {len(reached)} rows reach {100 * TARGET:.0f} % of their "
            "ideal."
        )
    if result["disagreements"]:
        worst = max(result["disagreements"].values())
        lines.append(f"Logits of a step, fused and stock: {worst:.3f} standard deviations at most.")
    return "\n".join(lines + [f"skipped: {x}" for x in result["skipped"]])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}"


if __name__ == "__main__":
    main()
