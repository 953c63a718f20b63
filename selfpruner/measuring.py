"""The commands that measure any model: evaluate, speed and profile.

`selfpruner.cli` registers them. As there, what is heavy is imported when a command runs, after what
can be refused without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from selfpruner.endings import plain_errors

_MODEL = "Folder, hub id, .gguf file or packaged model."
_Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the modelling file that lies beside the weights; exported models bring one.",
    ),
]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    *,
    tasks: Annotated[
        str | None, typer.Option(help="Names with commas between; all seven by default.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with, item by item.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Items a task; whole sets by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The same for both models.")] = 8,
    spread: Annotated[
        bool | None,
        typer.Option(
            "--spread/--no-spread",
            help="Layers on all GPUs, then in CPU memory, then on disk, or all on one device; "
            "spread by default where more than one GPU is visible.",
        ),
    ] = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Measure accuracy on commonsense tasks."""
    with plain_errors():
        _check_named(model)
        from selfpruner.config import TASKS

        names = tuple(tasks.replace(",", " ").split()) if tasks is not None else TASKS
        unknown = [name for name in names if name not in TASKS]
        if unknown or not names:
            got = ", ".join(unknown) or "none"
            raise ValueError(f"--tasks: got {got}; allowed: {', '.join(TASKS)}")
        from selfpruner.inspection import evaluate_command
        from selfpruner.progress import Progress

        with Progress() as progress:
            evaluate_command(
                model,
                baseline=baseline,
                tasks=[task for task in TASKS if task in names],
                samples=samples,
                batch_size=batch_size,
                spread=spread,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )


def speed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    *,
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, in turn.")] = None,
    engines: Annotated[
        str | None,
        typer.Option(help="transformers,vllm,llama.cpp; by default all that can run."),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Sequences side by side: 1,8,64 (1 on a CPU).")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt tokens: 128,1024,4096 (128,512 on a CPU).")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Decode steps timed together: 64 (16 on a CPU).")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="At most; three where time is short.")] = 5,
    vllm_python: Annotated[
        str | None,
        typer.Option(help="Interpreter that has vLLM, such as .venv-vllm/bin/python."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="MODEL's file for llama.cpp.")] = None,
    baseline_gguf: Annotated[
        Path | None, typer.Option(help="The baseline's file for llama.cpp.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write all figures, too: FILE.json or a page, FILE.html.")
    ] = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Measure prefill and decoding in the engines that serve the model, and memory."""
    with plain_errors():
        _check_named(model)
        if out is not None and out.suffix not in (".json", ".html"):
            raise ValueError(f"--out: got {out}; allowed: a name that ends in .json or .html")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--out: no such folder: {out.parent}")
        wanted_batches = _numbers("--batches", batches)
        wanted_lengths = _numbers("--lengths", lengths)
        from selfpruner.progress import Progress
        from selfpruner.speed import Asked, measure_speed

        asked = Asked(
            model=model,
            baseline=baseline,
            gguf=gguf,
            baseline_gguf=baseline_gguf,
            engines=None if engines is None else tuple(engines.replace(",", " ").split()),
            batches=wanted_batches,
            lengths=wanted_lengths,
            new_tokens=new_tokens,
            repeats=repeats,
            vllm_python=vllm_python,
            trust_remote_code=trust_remote_code,
        )
        with Progress() as progress:
            measured = measure_speed(asked, progress)
        from selfpruner.speed_page import show_speed

        show_speed(measured, out)


def _check_named(model: str) -> None:
    """Refuse an empty name, as that of an environment variable that is not set."""
    if not model:
        raise ValueError("MODEL: got an empty name")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Return whole numbers with commas between."""
    words = None if text is None else text.replace(",", " ").split()
    if words is not None and (not words or not all(x.isdecimal() for x in words)):
        raise ValueError(f"{option}: got {text!r}; allowed: whole numbers such as 1,8,64")
    return None if words is None else tuple(int(x) for x in words)


def profile(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL|CONFIG", help="A model, or a configuration for its grid."),
    ],
    *,
    phase: Annotated[
        Literal["decode", "prefill"] | None,
        typer.Option(help="What is timed; what CONFIG's runs are timed at, for a MODEL decode."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; as in CONFIG, or 1.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the prompt, or in the cache of each sequence; as in CONFIG, or 512."
        ),
    ] = None,
    plans: Annotated[int, typer.Option(help="Unseen plans to check it with, 10 at least.")] = 12,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what is known of this machine.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of its files; one in runs/profiles by model and load."),
    ] = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Measure times by width on this machine, and how well they predict whole models."""
    with plain_errors():
        _check_named(source)
        from selfpruner.latency_table import Timing
        from selfpruner.profile import profile_command
        from selfpruner.progress import Progress

        with Progress() as progress:
            page = profile_command(
                source,
                timing=Timing(phase, batch, tokens),
                plans=plans,
                again=again,
                out=out,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        typer.echo(f"page: {page}")
