"""The command `speed`: a model, alone or beside a baseline, in the engines that serve it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluators.engines import NAMES, Case, EngineReport, Row, Settings, Source, compare_engine
from pruning.loading import locate
from selfpruner.config import RunConfig
from selfpruner.environment import environment
from selfpruner.progress import Progress
from selfpruner.workbench import resolved_dtype, usable_device

SCHEMA_VERSION = 1
# Share of its matrix products' speedup that a pruned model should reach in a prefill.
PREFILL_TARGET = 0.90
# What the plug-in of this project does in vLLM, where it need not be installed.
_PLUG_IN = "pruning.registration:register"
_GGUF_OPTIONS = {"baseline": "--baseline-gguf", "model": "--gguf"}


@dataclass(frozen=True)
class Sizes:
    """What is timed where nothing else is asked for."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    new_tokens: int
    seconds: float


# On two CPU cores the small one ends in about two minutes for a model of 135M parameters.
SMALL = Sizes((1,), (128, 512), 16, 12.0)
LARGE = Sizes((1, 8, 64), (128, 1024, 4096), 64, 60.0)


@dataclass(frozen=True)
class Asked:
    """The command line: two models, their GGUF files, engines and sizes; None takes a default."""

    model: str
    baseline: str | None = None
    gguf: Path | None = None
    baseline_gguf: Path | None = None
    engines: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    new_tokens: int | None = None
    repeats: int = 5
    vllm_python: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Line:
    """One comparison: a row of an engine beside what it could reach.

    `ideal` is the speedup of the prefill's matrix products timed alone (in transformers, the same
    dtype), or of the bytes that a decode step reads; `reached` is the measured share of it. Both
    are None where there is nothing to hold the row against.
    """

    engine: str
    row: Row
    ideal: float | None
    reached: float | None


@dataclass(frozen=True)
class SpeedReport:
    """All that the command measured. Models are named `baseline` and `model`."""

    models: dict[str, str]
    device: str
    environment: dict[str, Any]
    settings: Settings
    engines: tuple[EngineReport, ...]

    def lines(self) -> list[Line]:
        """Return the comparisons: prefill and decode, engine by engine."""
        return [
            _line(report, row, self.engines)
            for report in self.engines
            for row in report.rows
            if row.phase != "products"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: the fields, and `comparison` with one entry per line."""
        comparison = [
            {
                "engine": x.engine,
                "phase": x.row.phase,
                "batch": x.row.batch,
                "tokens": x.row.tokens,
                "speedup": x.row.speedup,
                "ideal": x.ideal,
                "reached": x.reached,
            }
            for x in self.lines()
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "prefill_target": PREFILL_TARGET,
            "comparison": comparison,
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def measure_speed(asked: Asked, progress: Progress) -> SpeedReport:
    """Return the times of the asked models in every asked engine.

    Raises:
        ValueError: an unknown model or engine, sizes below 1, or no engine measured anything; one
            line for each.
    """
    config = RunConfig(model=asked.model)
    device = usable_device(config)
    sizes = LARGE if device == "cuda" else SMALL
    cases = _cases(asked, sizes)
    settings = Settings(
        dtype=str(resolved_dtype(config)).removeprefix("torch."),
        device=device,
        threads=_threads(),
        repeats=asked.repeats,
        seconds=sizes.seconds,
        trust_remote_code=asked.trust_remote_code,
    )
    names = {"model": asked.model}
    if asked.baseline not in (None, asked.model):
        names = {"baseline": str(asked.baseline), **names}
    if asked.baseline_gguf is not None and "baseline" not in names:
        raise ValueError(
            f"--baseline-gguf: got {asked.baseline_gguf} without --baseline, another model than "
            f"{asked.model}"
        )
    files = {"baseline": asked.baseline_gguf, "model": asked.gguf}
    folders = {role: Source(*locate(name)) for role, name in names.items()}
    packed = _packed(folders, files)
    told = {
        "transformers": settings,
        "vllm": replace(settings, prepare=_PLUG_IN),
        "llama.cpp": replace(settings, seconds=SMALL.seconds),  # its CPU build, on any machine
    }
    reports = [
        _engine(name, packed, _cases(asked, SMALL), told[name], asked, progress)
        if name == "llama.cpp"
        else _engine(name, folders, cases, told[name], asked, progress)
        for name in _engines(asked)
    ]
    if all(x.absent is not None for x in reports):
        raise ValueError("\n".join(f"speed: {x.engine}: {x.absent}" for x in reports))
    described = environment(seed=0)
    return SpeedReport(names, _device(device, described), described, settings, tuple(reports))


def _cases(asked: Asked, sizes: Sizes) -> list[Case]:
    batches, lengths = asked.batches or sizes.batches, asked.lengths or sizes.lengths
    new_tokens = asked.new_tokens or sizes.new_tokens
    if min(*batches, *lengths, new_tokens, asked.repeats) < 1:
        raise ValueError(
            f"speed: got batches {list(batches)}, lengths {list(lengths)}, new tokens "
            f"{new_tokens}, repeats {asked.repeats}; allowed: 1 and more"
        )
    return [Case(batch, length, new_tokens) for batch in batches for length in lengths]


def _packed(
    folders: Mapping[str, Source], files: Mapping[str, Path | None]
) -> dict[str, Source | None]:
    """Return the GGUF file of each model: the given ones, else those that the models are.

    A given file is not set beside one that nobody has named: their types may differ.

    Raises:
        ValueError: there is no such file.
    """
    given = any(files[role] is not None for role in folders)
    found: dict[str, Source | None] = {}
    for role, folder in folders.items():
        file = files[role]
        if file is not None and not file.is_file():
            raise ValueError(f"{_GGUF_OPTIONS[role]}: no such file: {file}")
        if file is None and folder.gguf_file is not None and not given:
            file = Path(folder.model) / folder.gguf_file
        found[role] = None if file is None else Source(str(file))
    return found


def _engines(asked: Asked) -> tuple[str, ...]:
    """Return the asked engines; all by default, what is not there is then said to be absent."""
    if asked.engines is None:
        return NAMES
    unknown = [name for name in asked.engines if name not in NAMES]
    if unknown or not asked.engines:
        got = ", ".join(unknown) or "none"
        raise ValueError(f"--engines: got {got}; allowed: {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in asked.engines)


def _engine(
    name: str,
    sources: Mapping[str, Source | None],
    cases: Sequence[Case],
    settings: Settings,
    asked: Asked,
    progress: Progress,
) -> EngineReport:
    models = {role: source for role, source in sources.items() if source is not None}
    if missing := [role for role in sources if role not in models]:
        reason = f"needs a GGUF file: {' and '.join(_GGUF_OPTIONS[x] for x in missing)}"
        return EngineReport(name, {}, absent=reason)
    if name == "vllm" and asked.vllm_python is None and importlib.util.find_spec("vllm") is None:
        return EngineReport(name, {}, absent="needs --vllm-python, an interpreter that has vLLM")
    with progress.stage(f"speed in {name}", total=len(cases)) as advance:
        return compare_engine(
            name,
            models,
            cases,
            settings,
            python=asked.vllm_python if name == "vllm" else None,
            tell=lambda _: advance(),
        )


def _line(report: EngineReport, row: Row, engines: Sequence[EngineReport]) -> Line:
    ideal = _ideal(report, row, engines)
    has_both = ideal is not None and row.speedup is not None
    reached = row.speedup / ideal if has_both else None  # type: ignore[operator]
    return Line(report.engine, row, ideal, reached)


def _ideal(report: EngineReport, row: Row, engines: Sequence[EngineReport]) -> float | None:
    """Return the speedup that a row is held against, from its engine or from transformers.

    llama.cpp has packed weights of its own: its bytes are its own, its products are not known.
    """
    own = [report] if report.engine == "llama.cpp" else list(engines)
    sources = [x for x in own if x.engine in ("transformers", report.engine)]
    if row.phase == "decode":
        found = [y.speedup for x in sources for y in x.bytes if _same(y, row)]
    else:
        found = [y.speedup for x in sources for y in x.rows if _same(y, row) and _is_products(y)]
    return next(iter(found), None)


def _same(found: Any, row: Row) -> bool:
    # vLLM's prompt is one token shorter where it and the new tokens would not fit its window.
    return bool(found.batch == row.batch and abs(found.tokens - row.tokens) <= 1)


def _is_products(row: Row) -> bool:
    return row.phase == "products"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _device(device: str, described: Mapping[str, Any]) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return str(described["cpu"]) if device == "cpu" else device
