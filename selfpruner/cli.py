"""The command `selfpruner`: from a configuration to a smaller model, and what it is worth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from selfpruner import measuring
from selfpruner.endings import plain_errors

if TYPE_CHECKING:
    from selfpruner.config import RunConfig
    from selfpruner.run_folder import RunFolder
    from selfpruner.workforce import Workforce

main = typer.Typer(
    help="Compress a pretrained LLM by structured pruning that an LLM can drive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Configuration, such as configs/demo.yaml.")
]
_Budget = Annotated[
    str | None, typer.Option(help="What may remain: parameters=0.7, memory=40GiB, speedup=1.4.")
]
_Setting = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, repeatable: search.population=16.")
]
_Full = Annotated[bool, typer.Option("--full", help="Evaluate on whole task sets.")]
_Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ray|ray://HOST:PORT",
        help="Processes here, a Ray cluster that the command starts, or one that is there.",
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of each worker; by default the cores shared out, on Ray as many as here."
    ),
]


@main.command()
def plan(
    config: _Config,
    *,
    model: Annotated[
        str | None, typer.Option(help="Known name, hub id or folder with a config.json.")
    ] = None,
    budget: _Budget = None,
    setting: _Setting = None,
    hardware: Annotated[
        str | None, typer.Option(help="Name under configs/hardware or a YAML file.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Of the search, as of compress; each has a device.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    full: _Full = False,
) -> None:
    """Say what a compression will cost, by stage, before any weight is loaded."""
    with plain_errors():
        import json

        from selfpruner.config import load_config
        from selfpruner.costs.estimate import estimate_costs
        from selfpruner.costs.hardware import load_hardware
        from selfpruner.costs.table import show

        settings = list(setting or []) + (["evaluation.samples=null"] if full else [])
        run = load_config(config, model=model, budget=budget, settings=settings)
        found = estimate_costs(run, load_hardware(hardware or run.hardware, devices), workers)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            show(found)


@main.command()
def compress(
    config: _Config,
    *,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .gguf file or packaged model.")
    ] = None,
    budget: _Budget = None,
    setting: _Setting = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/CONFIG by default.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of an earlier run, which is removed.")
    ] = False,
    pick: Annotated[
        str | None,
        typer.Option(
            help="Plan to finish where front.targets are set: budget, knee, fastest or "
            "most-accurate."
        ),
    ] = None,
    full: _Full = False,
    workers: _Workers = "1",
    threads: _Threads = None,
) -> None:
    """Prune a model to a budget, export it and report accuracy and speed."""
    folder = out or Path("runs") / config.stem
    with plain_errors(folder, _options(workers, threads)):
        from selfpruner.config import load_config
        from selfpruner.run_folder import RunFolder
        from selfpruner.workforce import Workforce

        settings = list(setting or []) + (["evaluation.samples=null"] if full else [])
        run = load_config(config, model=model, budget=budget, pick=pick, settings=settings)
        workforce = Workforce.parse(workers, threads)
        workforce.check()
        run_folder = RunFolder.create(folder, run, replace=replace, threads=workforce.threads)
        _run(run, run_folder, workforce, is_new=True)


@main.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that was stopped.")],
    *,
    workers: _Workers = "1",
    threads: _Threads = None,
) -> None:
    """Go on with a run that was stopped or killed.

    Scored plans and the LLM's replies are kept; the ranking, the refit and the judging are done
    again. Give the --workers and --threads that it began with: others may rank otherwise.
    """
    with plain_errors(run, _options(workers, threads)):
        from selfpruner.config import parse_config
        from selfpruner.run_folder import RunFolder
        from selfpruner.workforce import Workforce

        workforce = Workforce.parse(workers, threads)
        workforce.check()
        folder = RunFolder.open(run)
        if folder.results.is_file():
            from selfpruner.report import write_report

            page = folder.report if folder.report.is_file() else write_report(folder.path)
            typer.echo(f"finished already; report: {page}")
            return
        text = folder.config.read_text(encoding="utf-8")
        _run(parse_config(text, str(folder.config)), folder, workforce, is_new=False)


def _run(config: RunConfig, folder: RunFolder, workforce: Workforce, *, is_new: bool) -> None:
    """Run the pipeline in `folder` and name the report; a new one that fails early is removed."""
    from selfpruner import pipeline
    from selfpruner.progress import Progress
    from selfpruner.stopping import terminable

    with folder.locked(), terminable():
        try:
            with Progress() as progress:
                report_file = pipeline.compress(config, folder, progress, workforce)
        except Exception:
            if is_new:
                folder.remove_if_unused()
            raise
    typer.echo(f"report: {report_file}")


def _options(workers: str, threads: int | None) -> str:
    """Return the options that a resumed run needs to score as it began."""
    asked = {"--workers": workers if workers != "1" else None, "--threads": threads}
    return "".join(f" {name} {value}" for name, value in asked.items() if value is not None)


for _measure in (measuring.evaluate, measuring.speed, measuring.profile):
    main.command()(_measure)


@main.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="Folder of a finished run, or a model, such as the dense one."
        ),
    ],
    *,
    to: Annotated[
        Literal["hf", "gguf"],
        typer.Option(help="A Hugging Face folder, or one file for llama.cpp."),
    ],
    dtype: Annotated[
        Literal["bf16", "f32", "f16", "q8_0"] | None,
        typer.Option(
            help="Of the matrices: in a GGUF file f16, f32 or q8_0, by default f16; in a folder "
            "bf16, f16 or f32, by default what a folder has and bf16 of any other model."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to; needed but for the GGUF file of a run: RUN/model.gguf."),
    ] = None,
) -> None:
    """Write the pruned model of a run, or any other model, for another engine."""
    with plain_errors():
        if to == "gguf" and not Path(source).is_dir():
            raise ValueError(f"{source}: no folder; --to hf --out FOLDER writes one of any model")
        if to == "gguf" and dtype == "bf16":
            raise ValueError("--dtype: got bf16; allowed with --to gguf: f32, f16, q8_0")
        from selfpruner.exporting import export_gguf, export_hf
        from selfpruner.progress import Progress

        with Progress() as progress:
            if to == "gguf":
                kind = "f16" if dtype is None or dtype == "bf16" else dtype
                typer.echo(export_gguf(source, out, kind, progress))
            else:
                typer.echo(export_hf(source, out, dtype, progress))


@main.command()
def experiment(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="Experiment, such as configs/experiments/prompts.yaml."
        ),
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
    with plain_errors():
        from selfpruner.experiment_config import load_experiment
        from selfpruner.workforce import Workforce

        workforce = Workforce.parse(workers, threads)
        workforce.check()
        load_experiment(config)  # a wrong file is refused before anything heavy is imported
        from selfpruner import experiment as study
        from selfpruner.experiment_table import table
        from selfpruner.progress import Progress

        file = results or Path("benchmarks") / "results" / f"{config.stem}.jsonl"
        with Progress() as progress:
            found = study.run_experiment(config, folder, file, progress, workforce=workforce)
        typer.echo(table(found))
        typer.echo(f"\npage: {folder / 'experiment.html'}")


@main.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Page that shows several runs side by side; comparison.html."),
    ] = None,
) -> None:
    """Write a run's report.html anew; of several runs, one page that compares them."""
    with plain_errors():
        from selfpruner.run_folder import RunFolder

        folders = [RunFolder.open(path).path for path in runs]
        if out is not None and len(folders) == 1:
            raise ValueError("--out: allowed with several runs; that of one is RUN/report.html")
        from selfpruner.report import write_comparison, write_report

        one, side_by_side = len(folders) == 1, out or Path("comparison.html")
        page = write_report(folders[0]) if one else write_comparison(folders, side_by_side)
        typer.echo(f"report: {page}")


if __name__ == "__main__":
    sys.exit(main())
