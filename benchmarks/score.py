"""Where the time of a score goes: the pass, the divergence, matrix products, copies, Python.

    python -m benchmarks.score [--data-root DIR] [--repeats 9]

One plan with its cuts at hand is scored on 8,192 search tokens, by turns with a pass that stops at
the hidden states: the difference is the divergence. Three more scores run under torch's profiler.
What no operation accounts for is Python, and the profiler itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from agent import allocators
from benchmarks.cost import Scene, bench_of
from pruning.plan import Plan
from selfpruner.workbench import settle_process

PROFILED = 3
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "copies": ("copy_", "cat", "stack", "index", "index_select", "embedding", "clone", "fill_"),
}


def main() -> None:
    """Time the passes by turns and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    settle_process()
    scene = Scene(bench_of(options.data_root))
    plan = scene.bench.grid.plan(allocators.heuristic(scene.bench.space, scene.errors))
    scores, passes = _by_turns(scene, plan, options.repeats)
    threads = torch.get_num_threads()
    print(f"{scene.bench.model.dtype}, {threads} threads, {options.repeats} repeats by turns\n")
    print(_divergence(scores, passes))
    print(f"\n{_profiled(scene, plan)}")


def _by_turns(scene: Scene, plan: Plan, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of scores and of passes without the divergence; the first are not kept."""
    tokens, batch = scene.bench.texts.search, scene.bench.config.evaluation.batch_size

    def score() -> None:
        scene.fitness([plan], range(scene.fitness.num_sequences))

    @torch.no_grad()
    def stop_at_hidden_states() -> None:
        for part in tokens.split(batch):
            list(scene.elastic.hidden_states([plan], part))

    rows = [(_seconds(score), _seconds(stop_at_hidden_states)) for _ in range(repeats + 1)]
    scores, passes = zip(*rows[1:], strict=True)
    return list(scores), list(passes)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _divergence(scores: Sequence[float], passes: Sequence[float]) -> str:
    shares = [100 * (x / y - 1) for x, y in zip(scores, passes, strict=True)]
    rows = {"score": scores, "pass": passes, "divergence, % of a pass": shares}
    lines = ["| what | median | quartiles |", "|---|---:|---:|"]
    for name, values in rows.items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def _profiled(scene: Scene, plan: Plan) -> str:
    """Return the shares of the wall time of some scores, by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        wall = sum(
            _seconds(lambda: scene.fitness([plan], range(scene.fitness.num_sequences)))
            for _ in range(PROFILED)
        )
    kinds = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    seconds = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for event in found.key_averages():
        seconds[kinds.get(event.key, "other operations")] += event.self_cpu_time_total / 1e6
    seconds["Python and the profiler"] = wall - sum(seconds.values())
    lines = [f"| of {PROFILED} scores, {wall:.1f} s | share |", "|---|---:|"]
    lines += [f"| {kind} | {100 * x / wall:.1f} % |" for kind, x in seconds.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
