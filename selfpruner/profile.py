"""The command `profile`: the latency table of a model on this machine, and how well it predicts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pruning.families import family_of
from pruning.loading import architecture_of, load
from pruning.plan import Grid, Plan
from selfpruner.config import RunConfig, load_config
from selfpruner.environment import device_name, package_version
from selfpruner.latency_table import Detail, LatencyTable, Timing, Workload
from selfpruner.notation import times
from selfpruner.profiling import known_table, random_plans, repeatability, timed
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import grid_of, resolved_dtype, settle_process, usable_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_PLANS = 10
_SEED = 1  # calibration has another one


@dataclass(frozen=True)
class Row:
    """A whole model that the table never saw: milliseconds, `parameters` of its blocks."""

    plan: Plan
    parameters: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The predicted time over the measured one, less 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Profile:
    """A latency table, and what it predicts beside what was measured.

    Attributes:
        model: its name.
        conditions: device, threads, dtype and versions.
        table: the table.
        dense: the dense model, measured in turn with the rows.
        rows: unseen plans.
        repeatability: relative difference of two measurements of one of the unseen plans (on a CPU
            of its time over the dense model's), the median.
    """

    model: str
    conditions: dict[str, Any]
    table: LatencyTable
    dense: Row
    rows: tuple[Row, ...]
    repeatability: float

    @property
    def median_error(self) -> float:
        """The median of the absolute relative errors of predicted times."""
        return float(np.median([abs(x.error) for x in self.rows]))

    @property
    def worst_error(self) -> float:
        """The largest of them."""
        return max(abs(x.error) for x in self.rows)

    @property
    def speedup_error(self) -> float:
        """The median of those of predicted speedups: a machine that is slower today drops out."""
        return float(
            np.median([abs((1 + self.dense.error) / (1 + x.error) - 1) for x in self.rows])
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema_version": 1,
            "model": self.model,
            "conditions": self.conditions,
            "median_error": self.median_error,
            "worst_error": self.worst_error,
            "median_error_of_speedups": self.speedup_error,
            "repeatability": self.repeatability,
            "dense": _told(self.dense),
            "plans": [_told(x) for x in self.rows],
            "table": self.table.to_json(),
        }


def profile_command(
    source: str,
    *,
    timing: Timing,
    plans: int,
    again: bool,
    out: Path | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Path:
    """Print the profile of `source`, a model or a configuration, and write its JSON and page.

    Raises:
        ValueError: fewer than `LEAST_PLANS` plans, or the model cannot be loaded or has no widths
            to choose from; one line.
        OSError: the folder cannot be written.
    """
    if plans < LEAST_PLANS:
        raise ValueError(f"--plans: got {plans}, allowed at least {LEAST_PLANS}")
    settle_process()
    config = load_config(Path(source)) if _is_config(source) else RunConfig(model=source)
    asked = config.workload if _is_config(source) else Workload("decode", 1, 512)
    if config.memory == "streamed":
        raise ValueError(
            f"{source}: got memory: streamed, allowed whole: models are timed as they are, on one "
            "device"
        )
    workload = timing.of(asked)
    trusted = trust_remote_code or config.trust_remote_code
    grid = grid_of(config, architecture_of(config.model, trust_remote_code=trusted))
    folder = out or default_folder(source, workload)
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage("load"):
        model, _ = load(
            config.model,
            resolved_dtype(config),
            usable_device(config),
            trust_remote_code=trusted,
        )
    found = profile(model, config.model, grid, workload, plans, progress, again=again)
    RunFolder(folder).write_json("profile.json", found.to_json())
    _print(found)
    from selfpruner.profile_page import write_profile_page

    return write_profile_page(found, folder / "profile.html")


def default_folder(source: str, workload: Workload) -> Path:
    """Return where the profile of a model or of a configuration goes, by its name."""
    # A model's name may have dots: Llama-3.2-1B and Llama-3.2-3B share no folder.
    name = Path(source).stem if _is_config(source) else Path(source).name
    return Path("runs") / "profiles" / f"{name}-{workload.phase}-{workload.batch}x{workload.tokens}"


def _is_config(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def profile(
    model: PreTrainedModel,
    name: str,
    grid: Grid,
    workload: Workload,
    plans: int,
    progress: Progress,
    *,
    again: bool = False,
) -> Profile:
    """Return the table, measured or known, beside `plans` whole random models measured now.

    Raises:
        ValueError: the grid has not as many.
    """
    detail = Detail.fine(on_gpu=model.device.type == "cuda")
    _, architecture = family_of(model)
    dense = Plan.dense(architecture)
    unseen = _unseen(grid, architecture.layers, plans, detail)
    table = known_table(model, grid, workload, detail, progress, again=again)
    with progress.stage("unseen plans", detail.rounds * (1 + plans)) as advance:
        rounds = timed(model, [dense, *unseen], workload, detail, on_visit=advance)
    rows = [
        Row(plan, architecture.block_parameters(plan), table.milliseconds(plan), measured)
        for plan, measured in zip([dense, *unseen], np.median(rounds, axis=0).tolist(), strict=True)
    ]
    conditions = {
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "cuda_graphs": detail.graphs and model.device.type == "cuda",
    }
    return Profile(name, conditions, table, rows[0], tuple(rows[1:]), repeatability(rounds[:, 1:]))


def _unseen(grid: Grid, layers: int, count: int, detail: Detail) -> list[Plan]:
    """Return different plans that neither calibrated the table nor are among its widths."""
    seen = set(random_plans(grid, layers, detail.calibration, seed=0))
    for seed in range(_SEED, _SEED + 20):
        drawn = random_plans(grid, layers, count, seed)
        if len(set(drawn) - seen) == count and not any(x.is_uniform for x in drawn):
            return drawn
    raise ValueError(f"--plans: got {count}; this model has not as many different random plans")


def _told(row: Row) -> dict[str, Any]:
    return {**asdict(row), "plan": row.plan.to_json(), "error": row.error}


def _print(found: Profile) -> None:
    title = f"{found.model}: {found.table.workload}, {found.conditions['device']}"
    table = Table(title=title, title_justify="left")
    for heading in (
        "plan",
        "kept",
        "predicted ms",
        "measured ms",
        "error",
        "predicted",
        "measured",
    ):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for index, row in enumerate((found.dense, *found.rows)):
        table.add_row(
            str(index) if index else "dense",
            f"{100 * row.parameters / found.dense.parameters:.1f} %",
            f"{row.predicted:.2f}",
            f"{row.measured:.2f}",
            f"{100 * row.error:+.1f} %",
            times(found.dense.predicted / row.predicted),
            times(found.dense.measured / row.measured),
        )
    console = Console()
    console.print(table)
    # Without CUDA graphs plans are timed beside the dense model, whose drift then drops out.
    what = "itself" if found.conditions["cuda_graphs"] else "its speedups"
    console.print(
        f"{len(found.rows)} unseen plans: median error {100 * found.median_error:.1f} % "
        f"(of speedups {100 * found.speedup_error:.1f} %), worst {100 * found.worst_error:.1f} %; "
        f"the machine repeats {what} within {100 * found.repeatability:.1f} %"
    )
