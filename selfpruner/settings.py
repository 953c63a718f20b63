"""The levels of a run's configuration: what each may hold, and its defaults."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from selfpruner.sources import REPORT_ONLY, check_source

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Metric = Literal["magnitude", "obs", "random", "wanda_sp", "wifv"]
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


class Settings(BaseModel):
    """Base of every level: frozen, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BudgetSettings(Settings):
    """What may remain: a share of the blocks in (0, 1], or total parameters above 1."""

    parameters: Annotated[float, Field(gt=0)] | None = None
    macs: Annotated[float, Field(gt=0, le=1)] | None = None
    bytes: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name, value in self.model_dump().items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"got {got}; allowed: exactly one of parameters, macs, bytes")
        return self

    @property
    def kind(self) -> Literal["parameters", "macs", "bytes"]:
        """The one kind of cost that is limited."""
        if self.parameters is not None:
            return "parameters"
        return "macs" if self.macs is not None else "bytes"

    @property
    def target(self) -> float:
        """The limit: a share of the blocks' cost, or total parameters above 1."""
        return float(getattr(self, self.kind))


class PruningSettings(Settings):
    """How units are ranked, removed and made up for.

    `metric` ranks MLP channels, and attention units where `attention_metric` is null.
    `ridge: auto` takes for each block the ridge with the least error on held-out calibration
    tokens. `calibration: auto` doubles the calibration tokens of a frozen ranking, up to
    `data.calibrate.tokens`, until that error falls by less than 1 %; the refit takes them all.
    `refit_target` is what the refit of a block imitates: the dense residual stream, or the output
    of the dense block.
    """

    metric: Metric = "wifv"
    attention_metric: Metric | None = None
    statistics: Literal["frozen", "sequential"] = "frozen"
    calibration: Literal["all", "auto"] = "all"
    reconstruction: Literal["none", "bias", "least_squares"] = "least_squares"
    ridge: float | Literal["auto"] = 0.1
    refit: bool = True
    refit_target: Literal["stream", "block"] = "stream"
    step: Count = 32
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
    """Further budgets of the run's kind, as shares, and how hard each is searched for."""

    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    effort: Annotated[float, Field(gt=0, le=1)] = 0.3


class ExportSettings(Settings):
    """How the pruned model is written."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
