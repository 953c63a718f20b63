"""The run configuration: one validated, frozen tree from YAML files and the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agent.settings import DriverSettings, SearchSettings
from selfpruner.complaints import complaints
from selfpruner.sources import REPORT_ONLY, check_source
from selfpruner.yaml_text import Layers, checked_mapping, parse_yaml, read_mapping

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

FITNESSES = ("kl", "kl_top512", "perplexity", "accuracy", "latency")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
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
    """How units are ranked, removed and made up for."""

    metric: Literal["magnitude", "random", "wanda_sp", "wifv"] = "wifv"
    statistics: Literal["frozen", "sequential"] = "frozen"
    reconstruction: Literal["none", "bias", "least_squares"] = "least_squares"
    ridge: Annotated[float, Field(gt=0)] = 0.01
    refit: bool = True
    step: Count = 32
    attention_unit: Literal["kv_group", "query_head"] = "kv_group"
    prune_attention: bool = True


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


class ExportSettings(Settings):
    """How the pruned model is written."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class RunConfig(Settings):
    """One run: a pure function of this tree, the seed and the LLM's replies."""

    model: Annotated[str, Field(min_length=1)]
    recipe: str = "best"
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    budget: BudgetSettings = BudgetSettings(parameters=0.7)
    pruning: PruningSettings = PruningSettings()
    fitness: dict[str, Annotated[float, Field(ge=0)]] = {"kl": 1.0}
    data: DataSettings = DataSettings()
    search: SearchSettings = SearchSettings()
    driver: DriverSettings = DriverSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()

    @field_validator("fitness")
    @classmethod
    def _known_fitness(cls, weights: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in weights if name not in FITNESSES]
        if unknown or not any(weights.values()):
            raise ValueError(
                f"got {weights}; allowed: positive weights over {', '.join(FITNESSES)}"
            )
        return weights

    @model_validator(mode="after")
    def _fitness_has_data(self) -> Self:
        if self.fitness.get("accuracy") and not self.data.choices:
            raise ValueError("data.choices: got 0; allowed: at least 1 for the accuracy fitness")
        return self

    @model_validator(mode="after")
    def _proposals_have_a_driver(self) -> Self:
        asks_llm = self.search.allocator == "llm" and self.search.classical_share < 1
        if asks_llm and self.driver.kind == "none":
            raise ValueError("driver.kind: got 'none'; search.allocator llm needs a driver")
        return self

    def to_yaml(self) -> str:
        """Return the whole tree as YAML; `parse_config` of it gives an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(
    path: Path,
    *,
    model: str | None = None,
    budget: str | None = None,
    settings: Sequence[str] = (),
) -> RunConfig:
    """Return the configuration of file `path`: recipe, then the file, then the command line.

    Args:
        path: YAML file.
        model: takes the place of the file's model.
        budget: `kind=number`, takes the place of the whole budget.
        settings: `dotted.name=value`, values parsed as YAML, laid on top in order.

    Raises:
        ValueError: one line for each thing that is wrong, with what is allowed and where.
    """
    own = _layers(None, path, model, budget, settings)
    recipe = _recipe_path(own.data.get("recipe", "best"), own.origin("recipe", str(path)))
    return _validated(_layers(recipe, path, model, budget, settings), str(path))


def parse_config(text: str, where: str) -> RunConfig:
    """Return the configuration that `RunConfig.to_yaml` wrote; no recipe is read.

    Raises:
        ValueError: one line for each thing that is wrong.
    """
    layers = Layers()
    layers.add(checked_mapping(parse_yaml(text, where), where), where)
    return _validated(layers, where)


def _layers(
    recipe: Path | None,
    path: Path,
    model: str | None,
    budget: str | None,
    settings: Sequence[str],
) -> Layers:
    """Return the recipe's settings, the file's over them and the command line's on top."""
    layers = Layers()
    if recipe is not None:
        layers.add(_recipe_defaults(recipe), str(recipe))
    layers.add(read_mapping(path), str(path))
    if model is not None:
        layers.add({"model": model}, "--model")
    if budget is not None:
        name, value = _assignment(budget, "--budget")
        layers.add({"budget": {name: value}}, "--budget")
    for text in settings:
        name, value = _assignment(text, "--set")
        layers.set(name, value, f"--set {name}")
    return layers


def _assignment(text: str, option: str) -> tuple[str, Any]:
    """Return the name and the value of `name=value`."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        example = "parameters=0.7" if option == "--budget" else "search.population=16"
        raise ValueError(f"{option}: got {text!r}, want name=value, such as {example}")
    return name.strip(), parse_yaml(value, f"{option} {text}")


def _recipe_path(recipe: Any, where: str) -> Path:
    """Return the file of a recipe given by name or by path."""
    text = str(recipe)
    known = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
    if text in known:
        return CONFIGS / "recipes" / f"{text}.yaml"
    if text.endswith((".yaml", ".yml")) and Path(text).is_file():
        return Path(text)
    raise ValueError(
        f"{where}: recipe: got {text!r}; allowed: {', '.join(known)}, or the path of a YAML file"
    )


def _recipe_defaults(path: Path) -> dict[str, Any]:
    """Return the settings of a recipe file; which model and recipe to use is the run's to say."""
    data = read_mapping(path)
    for key in ("model", "recipe", "seed"):
        if key in data:
            raise ValueError(f"{path}: {key} is not allowed in a recipe; set it in the run's file")
    return data


def _validated(layers: Layers, where: str) -> RunConfig:
    """Return the tree, or raise with one line for each complaint.

    Values go through JSON so that strict types apply (no text for numbers, no true for 1) and
    lists may still become tuples.
    """
    text = json.dumps(layers.data, default=str)
    try:
        return RunConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        lines = complaints(RunConfig, error, lambda path: layers.origin(path, where))
        raise ValueError("\n".join(lines)) from None
