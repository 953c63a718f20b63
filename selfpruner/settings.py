"""The levels of a run's configuration: what each may hold, and its defaults."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from pruning.budget import BudgetKind
from selfpruner.latency_table import Phase, Workload
from selfpruner.notation import read_size
from selfpruner.sources import REPORT_ONLY, check_source

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Metric = Literal["magnitude", "obs", "random", "wanda_sp", "wifv", "wifv_squared"]
Pick = Literal["budget", "knee", "fastest", "most-accurate"]
Source = Annotated[str, Field(min_length=1)]
Task = Literal[
    "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"
]
TASKS: tuple[Task, ...] = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)


KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
_SIZED: tuple[BudgetKind, ...] = ("memory", "speedup")


class Settings(BaseModel):
    """Base of every level: frozen, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Bytes = Annotated[float, Field(gt=0), BeforeValidator(read_size)]


class BudgetSettings(Settings):
    """What may remain: exactly one kind.

    `parameters`, `macs` and `bytes` are a share of the blocks in (0, 1], `parameters` above 1 a
    total. `memory` is what all weights take, as `40GiB`, in the dtype of the export; with `tokens`
    also the KV cache of `batch` sequences (1 by default) that long. `speedup` is how many times
    as fast as the dense model the pruned one is predicted to be in a `phase` (decode by default):
    a decoded token after `tokens` (512), or the prefill of as many, for `batch` sequences.
    """

    parameters: Annotated[float, Field(gt=0)] | None = None
    macs: Annotated[float, Field(gt=0, le=1)] | None = None
    bytes: Annotated[float, Field(gt=0, le=1)] | None = None
    memory: Bytes | None = None
    speedup: Annotated[float, Field(ge=1)] | None = None
    phase: Phase | None = None
    batch: Count | None = None
    tokens: Count | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"got {got}; allowed: exactly one of {', '.join(KINDS)}")
        return self

    @model_validator(mode="after")
    def _details_belong_to_the_kind(self) -> Self:
        allowed = {"phase": ("speedup",), "batch": _SIZED, "tokens": _SIZED}
        for name, kinds in allowed.items():
            value = getattr(self, name)
            if value is not None and self.kind not in kinds:
                beside = " or ".join(f"budget.{kind}" for kind in kinds)
                raise ValueError(f"budget.{name}: got {value!r}; allowed only beside {beside}")
        if self.kind == "memory" and self.batch is not None and self.tokens is None:
            raise ValueError(
                f"budget.tokens: not given; budget.batch {self.batch} needs the length of a cache"
            )
        return self

    @property
    def kind(self) -> BudgetKind:
        """The one kind of cost that is limited."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def target(self) -> float:
        """What was asked, in the unit of the kind."""
        return float(getattr(self, self.kind))

    @property
    def is_share(self) -> bool:
        """Whether the target is a share of the blocks."""
        return self.kind in ("parameters", "macs", "bytes") and self.target <= 1

    @property
    def cached_tokens(self) -> int:
        """Tokens of all sequences whose KV cache counts as memory."""
        return 0 if self.tokens is None else (self.batch or 1) * self.tokens

    @property
    def workload(self) -> Workload:
        """What is to be faster, where the kind is a speedup."""
        return Workload(self.phase or "decode", self.batch or 1, self.tokens or 512)

    @property
    def name(self) -> str:
        """The budget in a word, as in names of cells: `parameters=0.7`, details behind commas."""
        details = {x: getattr(self, x) for x in ("phase", "batch", "tokens")}
        told = [f"{x}={value}" for x, value in details.items() if value is not None]
        return ",".join([f"{self.kind}={self.target:.12g}", *told])


class PruningSettings(Settings):
    """How units are ranked, removed and made up for.

    `metric` ranks MLP channels, and attention units where `attention_metric` is null.
    `ridge: auto` takes for each block the ridge with the least error on held-out calibration
    tokens. `calibration: auto` doubles the calibration tokens of a frozen ranking, up to
    `data.calibrate.tokens`, until that error falls by less than 1 %; the refit takes them all.
    `target` is what will run the pruned model: `cpu`, `tensor-cores`, `gguf` or `vllm-tpN` (N GPUs
    that share every layer). It says which numbers of heads are kept, and in steps of how many
    channels (32, 128, 256 and 128 N) where `step` is null; a null target is `tensor-cores` for a
    run on a GPU and `cpu` for one without.
    `fisher_tokens`: with how many calibration tokens, at most and in whole windows, but at least
    one, the curvature of the predictions is measured, by which units are ranked and cuts compared;
    0: by the error of a block's output.
    `refit_target` is what the refit of a block imitates: the dense residual stream, or the output
    of the dense block.
    """

    metric: Metric = "wifv"
    attention_metric: Metric | None = None
    statistics: Literal["frozen", "sequential"] = "frozen"
    calibration: Literal["all", "auto"] = "all"
    reconstruction: Literal["none", "bias", "least_squares"] = "least_squares"
    ridge: float | Literal["auto"] = 0.1
    fisher_tokens: Annotated[int, Field(ge=0)] = 0
    refit: bool = True
    refit_target: Literal["stream", "block"] = "stream"
    target: str | None = None
    step: Count | None = None
    attention_unit: Literal["kv_group", "query_head"] = "kv_group"
    prune_attention: bool = True

    @field_validator("ridge", mode="before")
    @classmethod
    def _number_or_auto(cls, ridge: object) -> object:
        if ridge == "auto":
            return ridge
        if isinstance(ridge, int | float) and not isinstance(ridge, bool) and 0 < ridge < math.inf:
            return ridge
        raise ValueError(f"got {ridge!r}; allowed: auto or a number above 0")


class TextSettings(Settings):
    """One set of text: a source and how many tokens of it."""

    source: Source = "passages"
    tokens: Count = 4096

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        check_source(source)
        if source in REPORT_ONLY:
            raise ValueError(f"got {source!r}; it is reported only, allowed under data.report")
        return source


class ReportTextSettings(Settings):
    """One reported text; `tokens: null` takes all there is."""

    source: Source = "passages"
    tokens: Count | None = 8192
    length: Annotated[int, Field(ge=2)] = 256

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        check_source(source)
        return source


class DataSettings(Settings):
    """All text of a run; the four roles never share a document."""

    root: str | None = None
    length: Annotated[int, Field(ge=2)] = 256
    calibrate: TextSettings = TextSettings(tokens=32768)
    search: TextSettings = TextSettings(tokens=4096)
    select: TextSettings = TextSettings(tokens=8192)
    report: tuple[ReportTextSettings, ...] = (ReportTextSettings(),)
    choices: Annotated[int, Field(ge=0)] = 32

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        for role in ("calibrate", "search", "select"):
            tokens = getattr(self, role).tokens
            if tokens < self.length:
                raise ValueError(
                    f"data.{role}.tokens: got {tokens}; allowed: at least data.length {self.length}"
                )
        for index, text in enumerate(self.report):
            if text.tokens is not None and text.tokens < text.length:
                raise ValueError(
                    f"data.report.{index}.tokens: got {text.tokens}; "
                    f"allowed: null or at least its length {text.length}"
                )
        return self


class SpeedSettings(Settings):
    """What is timed: prefill of `prompt_tokens`, then `new_tokens` one by one."""

    batch: Count = 1
    prompt_tokens: Count = 128
    new_tokens: Count = 16
    repeats: Count = 5


class EvaluationSettings(Settings):
    """What the finished model is judged by; `samples: null` means whole task sets."""

    tasks: tuple[Task, ...] = TASKS
    samples: Count | None = 40
    batch_size: Count = 8
    controls: tuple[Literal["uniform", "uniform_mlp"], ...] = ("uniform", "uniform_mlp")
    speed: SpeedSettings = SpeedSettings()


class FrontSettings(Settings):
    """Further budgets of the run's kind, shares or speedups, and how hard each is searched for.

    `pick` says which plan is finished and exported: that of the run's own budget, the knee of the
    front, the fastest, or the most accurate of the pruned ones.
    """

    targets: tuple[Annotated[float, Field(gt=0)], ...] = ()
    effort: Annotated[float, Field(gt=0, le=1)] = 0.3
    pick: Pick = "budget"


class ExportSettings(Settings):
    """How the pruned model is written."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
