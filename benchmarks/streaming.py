"""Does the memory of a streamed run grow with the number of layers? Anonymous peaks, side by side.

    python -m benchmarks.streaming [--hidden 512] [--layers 6] [--threads 1]

Random LLaMAs of equal width with L and 2 L layers are compressed with `memory` whole and streamed,
each run in a process of its own, with curvature, slopes, the refit and one control. What counts is
memory that cannot be dropped: RssAnon of /proc/PID/status, read every 10 ms; pages of files that
are mapped are not in it. `start` is what the process holds once everything is imported and nothing
is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from selfpruner.profiling import CACHE_VARIABLE

WORDS = [f"w{number}" for number in range(509)]
SETTINGS = {
    "dtype": "float32",
    "device": "cpu",
    "pruning": {"step": 64},
    "search": {"population": 3, "crossover": 1, "mutate": 2},
    "evaluation": {"tasks": [], "batch_size": 4, "controls": ["uniform_mlp"]},
}
LENGTH, EVALUATIONS = 128, 12  # slopes take five of them
TOKENS = {"calibrate": 1024, "search": 512, "select": 512, "report": 512}


@dataclass(frozen=True)
class Peak:
    """Anonymous memory of one run in bytes, and its time.

    Attributes:
        start: after the imports.
        peak: the most that was seen.
        seconds: of the process.
        outcome: what both ways have to agree on: fitness of all plans, slopes, plan and ranking.
    """

    start: int
    peak: int
    seconds: float
    outcome: list[object]

    @property
    def own(self) -> int:
        """What the run adds to the imports."""
        return self.peak - self.start


def main() -> None:
    """Measure all four runs and print the table; or be one of these runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", nargs=2, metavar=("CONFIG", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        config, folder = map(Path, options.run)
        _compress(config, folder, options.threads)
        return
    with TemporaryDirectory() as name:
        print(_table(_measured(Path(name), options), options.layers))


def _measured(folder: Path, options: argparse.Namespace) -> dict[tuple[str, int], Peak]:
    _write_text(folder / "text.jsonl")
    found = {}
    for layers in (options.layers, 2 * options.layers):
        model = folder / f"model-{layers}"
        _write_model(model, options.hidden, layers)
        for memory in ("whole", "streamed"):
            config = folder / f"{memory}-{layers}.yaml"
            config.write_text(json.dumps(_settings(folder, model, memory)))  # JSON is YAML
            found[memory, layers] = _watched(config, folder / config.stem, options.threads)
    return found


def _settings(folder: Path, model: Path, memory: str) -> dict[str, object]:
    texts = {
        role: {"source": str(folder / "text.jsonl"), "tokens": n} for role, n in TOKENS.items()
    }
    report = [texts.pop("report") | {"length": LENGTH}]
    data = {"length": LENGTH, "choices": 0, "report": report, **texts}
    search = SETTINGS["search"] | {"evaluations": EVALUATIONS}  # type: ignore[operator]
    return SETTINGS | {"model": str(model), "memory": memory, "data": data, "search": search}


def _watched(config: Path, folder: Path, threads: int) -> Peak:
    """Return the peak of a run in a process of its own.

    Raises:
        RuntimeError: the run failed.
    """
    command = [sys.executable, "-m", "benchmarks.streaming", "--threads", str(threads)]
    started, peak = time.monotonic(), 0
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--run", config, folder],
            stdout=output,
            stderr=output,
            env=os.environ | {CACHE_VARIABLE: str(folder.with_suffix(".cache"))},
        )
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{config.name}: {log.read_text()[-2000:]}")
    seconds = time.monotonic() - started
    start = json.loads(folder.with_suffix(".start.json").read_text())
    lines = (folder / "candidates.jsonl").read_text().splitlines()
    outcome = [json.loads(line)["scores"]["fitness"] for line in lines]
    outcome += json.loads((folder / "slopes.jsonl").read_text())["table"]
    outcome.append(json.loads((folder / "plan.json").read_text()) | {"model": None})
    return Peak(start, peak, seconds, outcome)


def anonymous_bytes(process: int | str) -> int:
    """Return the anonymous resident memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon:")), 0)


def _compress(config: Path, path: Path, threads: int) -> None:
    import torch

    from selfpruner import pipeline
    from selfpruner.config import load_config
    from selfpruner.progress import Progress
    from selfpruner.run_folder import RunFolder

    torch.set_num_threads(threads)
    run = load_config(config)
    folder = RunFolder.create(path, run)
    path.with_suffix(".start.json").write_text(str(anonymous_bytes("self")))
    with Progress() as progress:
        pipeline.compress(run, folder, progress)


def _write_text(path: Path) -> None:
    rng = random.Random(0)
    rows = ({"text": " ".join(rng.choices(WORDS, k=160))} for _ in range(400))
    path.write_text("\n".join(map(json.dumps, rows)))


def _write_model(folder: Path, hidden: int, layers: int) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from selfpruner.workbench import settle_process

    words = ["<unk>", "<s>", "</s>", *WORDS]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=LENGTH,
    )
    settle_process()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _table(found: dict[tuple[str, int], Peak], layers: int) -> str:
    lines = [
        f"| memory | {layers} layers | {2 * layers} layers | ratio | without the start | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for memory in ("whole", "streamed"):
        one, two = found[memory, layers], found[memory, 2 * layers]
        lines.append(
            f"| {memory} | {one.peak / 1e6:.0f} MB | {two.peak / 1e6:.0f} MB "
            f"| {two.peak / one.peak:.3f} | {one.own / 1e6:.0f} to {two.own / 1e6:.0f} MB, "
            f"{two.own / one.own:.3f} | {one.seconds:.0f}, {two.seconds:.0f} |"
        )
    same = all(
        found["whole", n].outcome == found["streamed", n].outcome for n in (layers, 2 * layers)
    )
    return "\n".join([*lines, f"same fitness of all plans, slopes and plan in both ways: {same}"])


if __name__ == "__main__":
    main()
