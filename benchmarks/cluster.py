"""Two Ray workers beside two independent processes that each score half of the same plans.

    python -m benchmarks.cluster

For a machine of two cores: Ray takes all there are. A random Llama of 27M parameters (times do not
depend on weights, and it loads at once), one thread each, `PLANS` plans a round on four search
sequences of 256 tokens. Both pairs hold their model all the time and take turns, so that one rests
while the other is timed; every round has other plans, which nobody has cut before. Rounds on file
are printed again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from agent import allocators
from pruning.plan import Plan
from selfpruner.arena import Arena
from selfpruner.blocks import Block
from selfpruner.cells import Cell, Figures, Row, run_cells
from selfpruner.config import RunConfig
from selfpruner.crew import Crew
from selfpruner.progress import Progress
from selfpruner.resident import Post, opened_arena, score_block
from selfpruner.run_folder import RunFolder
from selfpruner.sharing import Floats
from selfpruner.workbench import prepare, settle_process
from selfpruner.workforce import Workforce, threads_set

RESULTS = Path(__file__).parent / "results" / "cluster.jsonl"
Way = Callable[[list[Plan]], Floats]

PLANS = 12
SEQUENCES = (0, 1, 2, 3)
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


def main() -> None:
    """Run the rounds that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    cells = [{"plans": PLANS, "sequences": len(SEQUENCES), "round": i} for i in range(rounds)]
    with ExitStack() as stack:
        print(_table(run_cells(RESULTS, cells, _Bench(stack))))


class _Bench:
    """Both pairs of workers, started with the first round that is missing."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._pair: tuple[Arena, Way] | None = None

    def __call__(self, cell: Cell) -> Figures:
        """Return the seconds of both pairs; which is first changes from round to round."""
        arena, halves = self._pair or self._opened()
        plans = _plans(arena, cell["round"])
        ways: dict[str, Way] = {"ray": partial(_whole, arena), "processes": halves}
        seconds, scores = {}, {}
        for name in sorted(ways, reverse=bool(cell["round"] % 2)):
            started = time.perf_counter()
            scores[name] = ways[name](plans)
            seconds[name] = round(time.perf_counter() - started, 3)
        identical = bool(np.array_equal(scores["ray"], scores["processes"]))
        return {"seconds": seconds, "identical": identical}

    def _opened(self) -> tuple[Arena, Way]:
        if os.cpu_count() != 2:
            raise ValueError(f"cluster: got a machine of {os.cpu_count()} cores; allowed: 2")
        settle_process()
        enter = self._stack.enter_context
        enter(threads_set(1))
        place = Path(enter(tempfile.TemporaryDirectory()))
        config = _config(place)
        folder = RunFolder.create(place / "run", config)
        progress = Progress()
        bench = prepare(config, progress)
        arena = enter(opened_arena(bench, folder, progress, Workforce(address="local")))
        post = Post.of(bench, folder, 1)
        crew = enter(Workforce(2).residents(partial(score_block, post), False, progress.note))
        halves = partial(_halves, crew)
        # Dense references are computed once a worker and sequence; a search does it at its start.
        warming = _plans(arena, 10_000)
        arena.score(warming, SEQUENCES)
        halves(warming)
        self._pair = arena, halves
        return self._pair


def _config(folder: Path) -> RunConfig:
    """Write a random model with its text and return the configuration of a run on it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    model.save_pretrained(folder / "model")
    words = ["<unk>", *(f"w{i}" for i in range(1, SHAPE["vocab_size"]))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(words[1:], size=300))} for _ in range(200)]
    text = folder / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(text), "tokens": 1024}
    data = {"choices": 0, "search": source, "select": source, "report": [source]}
    data["calibrate"] = {**source, "tokens": 4096}
    return RunConfig.model_validate(
        {"model": str(folder / "model"), "dtype": "float32", "device": "cpu", "data": data}
    )


def _whole(arena: Arena, plans: list[Plan]) -> Floats:
    return arena.score(plans, SEQUENCES)


def _halves(crew: Crew[Block, Floats], plans: list[Plan]) -> Floats:
    """Return the scores of plans whose halves two processes compute, each in one call."""
    middle = len(plans) // 2
    halves = [plans[:middle], plans[middle:]]
    futures = [crew.submit(i, Block((), tuple(x), 0, SEQUENCES)) for i, x in enumerate(halves)]
    wait(futures)
    return np.vstack([crew.outcome(x) for x in futures])


def _plans(arena: Arena, seed: int) -> list[Plan]:
    """Return plans a few moves away from the heuristic one, as a generation has them."""
    space, grid = arena.bench.space, arena.bench.grid
    rng = np.random.default_rng(seed)
    shares = np.array(space.shares(allocators.heuristic(space, arena.errors)))
    plans = []
    for _ in range(PLANS):
        steps = rng.normal(0, 0.2, shares.shape) * (rng.random(shares.shape) < 0.1)
        moved = shares + steps
        plans.append(grid.plan(space.project(moved.clip(0, 1).tolist())))
    return plans


def _table(rows: list[Row]) -> str:
    """Return the medians and the ratio of throughputs, paired by round."""
    seconds = {name: [x["figures"]["seconds"][name] for x in rows] for name in ("ray", "processes")}
    ratios = sorted(b / a for a, b in zip(seconds["ray"], seconds["processes"], strict=True))
    lines = ["| two of | seconds a round, median | range |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {statistics.median(x):.2f} | {min(x):.2f} to {max(x):.2f} |"
        for name, x in seconds.items()
    ]
    same = sum(x["figures"]["identical"] for x in rows)
    return "\n".join(
        [
            *lines,
            f"throughput of ray over processes, paired: median {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}); identical scores in {same} of {len(rows)}",
        ]
    )


if __name__ == "__main__":
    main()
