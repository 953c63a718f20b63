"""The command `selfpruner`: from a configuration to a smaller model, and what it is worth."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from agent.drivers.driver import DriverError
from selfpruner.stopping import TerminatedError

if TYPE_CHECKING:
    from selfpruner.config import RunConfig
    from selfpruner.run_folder import RunFolder
    from selfpruner.workforce import Workforce

main = typer.Typer(
    help="Compress a pretrained LLM by structured pruning that an LLM drives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the modelling file that lies beside the weights; exported models bring one.",
    ),
]

_Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ray|ray://HOST:PORT",
        help="Processes here, a Ray cluster that the command starts, or one that is there.",
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of each worker; the cores shared out by default."),
]

_HOUSE = Path(__file__).resolve().parents[1]
_ROOMS = ("agent", "evaluators", "prompts", "pruning", "selfpruner")


@main.command()
def plan(
    config: Annotated[Path, typer.Argument(help="Configuration, such as configs/demo.yaml.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="Known name, hub id or folder with a config.json.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="What may remain: parameters=0.7.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: search.population=16.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Name under configs/hardware or a YAML file.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Evaluate on whole task sets.")] = False,
) -> None:
    """Say what a compression will cost, by stage, before any weight is loaded."""
    with _plain_errors():
        import json

        from selfpruner.config import load_config
        from selfpruner.costs.estimate import estimate_costs
        from selfpruner.costs.hardware import load_hardware
        from selfpruner.costs.table import show

        settings = list(setting or []) + (["evaluation.samples=null"] if full else [])
        run = load_config(config, model=model, budget=budget, settings=settings)
        found = estimate_costs(run, load_hardware(hardware or run.hardware, devices))
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            show(found)


@main.command()
def compress(
    config: Annotated[Path, typer.Argument(help="Configuration, such as configs/demo.yaml.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .gguf file or packaged model.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What may remain: parameters=0.7, memory=40GiB, speedup=1.4.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: search.population=16.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/CONFIG by default.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove an earlier run first.")
    ] = False,
    pick: Annotated[
        str | None,
        typer.Option(help="Plan of the front to finish: budget, knee, fastest or most-accurate."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Evaluate on whole task sets.")] = False,
    workers: _Workers = "1",
    threads: _Threads = None,
) -> None:
    """Prune a model to a budget, export it and report accuracy and speed."""
    folder = out or Path("runs") / config.stem
    with _plain_errors(folder):
        from selfpruner.config import load_config
        from selfpruner.run_folder import RunFolder
        from selfpruner.workforce import Workforce

        settings = list(setting or []) + (["evaluation.samples=null"] if full else [])
        settings += [f"front.pick={pick}"] if pick is not None else []
        run = load_config(config, model=model, budget=budget, settings=settings)
        workforce = Workforce.parse(workers, threads)
        run_folder = RunFolder.create(folder, run, replace=replace)
        _run(run, run_folder, workforce)


@main.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that was stopped.")],
    *,
    workers: _Workers = "1",
    threads: _Threads = None,
) -> None:
    """Go on with a run that was stopped or killed; nothing that was paid for is lost."""
    with _plain_errors(run):
        from selfpruner.config import parse_config
        from selfpruner.run_folder import RunFolder
        from selfpruner.workforce import Workforce

        workforce = Workforce.parse(workers, threads)
        folder = RunFolder.open(run)
        if folder.results.is_file() and folder.report.is_file():
            typer.echo(f"finished already; report: {folder.report}")
            return
        text = folder.config.read_text(encoding="utf-8")
        _run(parse_config(text, str(folder.config)), folder, workforce)


def _run(config: RunConfig, folder: RunFolder, workforce: Workforce) -> None:
    """Run the pipeline in `folder` and name the report."""
    from selfpruner import pipeline
    from selfpruner.progress import Progress
    from selfpruner.stopping import terminable

    with folder.locked(), terminable():
        try:
            with Progress() as progress:
                report_file = pipeline.compress(config, folder, progress, workforce)
        except (ValueError, OSError):
            folder.remove_if_unused()
            raise
    typer.echo(f"report: {report_file}")


@main.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file or packaged model.")],
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
    trust_remote_code: _Trust = False,
) -> None:
    """Measure accuracy on commonsense tasks."""
    with _plain_errors():
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
                trust_remote_code=trust_remote_code,
                progress=progress,
            )


@main.command()
def speed(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file or packaged model.")],
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
    with _plain_errors():
        if out is not None and out.suffix not in (".json", ".html"):
            raise ValueError(f"--out: got {out}; allowed: a name that ends in .json or .html")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--out: no such folder: {out.parent}")
        from selfpruner.progress import Progress
        from selfpruner.speed import Asked, measure_speed

        asked = Asked(
            model=model,
            baseline=baseline,
            gguf=gguf,
            baseline_gguf=baseline_gguf,
            engines=None if engines is None else tuple(engines.replace(",", " ").split()),
            batches=_numbers("--batches", batches),
            lengths=_numbers("--lengths", lengths),
            new_tokens=new_tokens,
            repeats=repeats,
            vllm_python=vllm_python,
            trust_remote_code=trust_remote_code,
        )
        with Progress() as progress:
            measured = measure_speed(asked, progress)
        from selfpruner.speed_page import show_speed

        show_speed(measured, out)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Return whole numbers with commas between."""
    words = None if text is None else text.replace(",", " ").split()
    if words is not None and (not words or not all(x.isdecimal() for x in words)):
        raise ValueError(f"{option}: got {text!r}; allowed: whole numbers such as 1,8,64")
    return None if words is None else tuple(int(x) for x in words)


@main.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    *,
    to: Annotated[
        Literal["hf", "gguf"],
        typer.Option(help="A Hugging Face folder, or one file for llama.cpp."),
    ],
    dtype: Annotated[
        Literal["f32", "f16", "q8_0"] | None,
        typer.Option(help="Of the matrices: f16 by default in a GGUF file, as it is in a folder."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to; RUN/model.gguf by default for gguf.")
    ] = None,
) -> None:
    """Write the pruned model of a run for another engine."""
    with _plain_errors():
        from selfpruner.exporting import export_gguf, export_hf
        from selfpruner.progress import Progress
        from selfpruner.run_folder import RunFolder

        folder = RunFolder.open(run)
        with Progress() as progress:
            if to == "gguf":
                typer.echo(export_gguf(folder, out, dtype or "f16", progress))
            else:
                typer.echo(export_hf(folder, out, dtype, progress))


@main.command()
def profile(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL|CONFIG", help="A model, or a configuration for its grid."),
    ],
    *,
    phase: Annotated[Literal["decode", "prefill"], typer.Option(help="What is timed.")] = "decode",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Of the prompt, or in the cache of each sequence.")
    ] = 512,
    plans: Annotated[int, typer.Option(help="Unseen plans to check it with.")] = 12,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what is known of this machine.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of its files; runs/profiles/MODEL-PHASE.")
    ] = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Measure times by width on this machine, and how well they predict whole models."""
    with _plain_errors():
        from selfpruner.latency_table import Workload
        from selfpruner.profile import profile_command
        from selfpruner.progress import Progress

        with Progress() as progress:
            page = profile_command(
                source,
                workload=Workload(phase, batch, tokens),
                plans=plans,
                again=again,
                out=out,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        typer.echo(f"page: {page}")


@main.command()
def experiment(
    config: Annotated[
        Path, typer.Argument(help="Experiment, such as configs/experiments/prompts.yaml.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder of its searches; runs/experiments/CONFIG.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="File of finished cells; benchmarks/results/CONFIG.jsonl."),
    ] = None,
    workers: _Workers = "1",
    threads: _Threads = None,
) -> None:
    """Compare ways of proposing plans over seeds; finished cells are never run twice."""
    folder = out or Path("runs") / "experiments" / config.stem
    with _plain_errors():
        from selfpruner import experiment as study
        from selfpruner.experiment_table import table
        from selfpruner.progress import Progress
        from selfpruner.workforce import Workforce

        workforce = Workforce.parse(workers, threads)
        file = results or Path("benchmarks") / "results" / f"{config.stem}.jsonl"
        with Progress() as progress:
            found = study.run_experiment(config, folder, file, progress, workforce=workforce)
        typer.echo(table(found))
        typer.echo(f"\npage: {folder / 'experiment.html'}")


@main.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    *,
    out: Annotated[Path, typer.Option(help="Page that shows several runs side by side.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write a run's report.html anew; of several runs, one page that compares them."""
    with _plain_errors():
        from selfpruner.report import write_comparison, write_report
        from selfpruner.run_folder import RunFolder

        folders = [RunFolder.open(path).path for path in runs]
        one = len(folders) == 1
        page = write_report(folders[0]) if one else write_comparison(folders, out)
        typer.echo(f"report: {page}")


@contextmanager
def _plain_errors(folder: Path | None = None) -> Iterator[None]:
    """Say what a user can mend in one line and exit 2; leave the rest its traceback.

    A ValueError counts as the user's when one of the rooms raised it itself; one from inside a
    library is a defect of ours. A stop by a signal exits 128 plus its number, drivers that gave
    up exit 75 (try again later).
    """
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT
        _stop(f"stopped by {number.name}", 128 + number, folder)
    except ValueError as error:
        if not _raised_here(error):
            raise
        _complain(str(error))
        raise typer.Exit(2) from None
    except DriverError as error:
        _stop(" ".join(str(error).split()), 75, folder)
    except OSError as error:
        named = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        _complain(" ".join((named or str(error)).split()))
        raise typer.Exit(2) from None


def _stop(message: str, code: int, folder: Path | None) -> NoReturn:
    """Leave with a line that says how to go on."""
    goes_on = folder is not None and folder.is_dir()
    _complain(f"{message}; `selfpruner resume {folder}` goes on" if goes_on else message)
    raise typer.Exit(code) from None


def _complain(message: str) -> None:
    for line in message.splitlines():
        typer.echo(f"selfpruner: {line}", err=True)


def _raised_here(error: BaseException) -> bool:
    """Return whether the statement that raised `error` lies in one of the rooms."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = Path(traceback.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(_HOUSE / room) for room in _ROOMS)


if __name__ == "__main__":
    sys.exit(main())
