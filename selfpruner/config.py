"""The run configuration: one validated, frozen tree from YAML files and the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from agent.settings import DriverSettings, Endpoint, SearchSettings
from pruning.alignment import Alignment
from selfpruner.complaints import complaints
from selfpruner.latency_table import Workload
from selfpruner.settings import (
    TASKS,
    BudgetSettings,
    DataSettings,
    Dtype,
    EvaluationSettings,
    ExportSettings,
    FrontSettings,
    PruningSettings,
    Settings,
    SpeedSettings,
    Task,
)
from selfpruner.yaml_text import Layers, checked_mapping, parse_yaml, read_mapping

__all__ = [
    "CONFIGS",
    "FITNESSES",
    "TASKS",
    "BudgetSettings",
    "DataSettings",
    "Dtype",
    "EvaluationSettings",
    "ExportSettings",
    "FrontSettings",
    "PruningSettings",
    "RunConfig",
    "SpeedSettings",
    "Task",
    "load_config",
    "parse_config",
]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

TEXT_TERMS = ("kl", "kl_top512", "perplexity")  # they meet the vocabulary
FITNESSES = (*TEXT_TERMS, "accuracy", "latency")


class RunConfig(Settings):
    """One run: a pure function of this tree, the seed and the LLM's replies."""

    model: Annotated[str, Field(min_length=1)]
    recipe: str = "best"
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory: Literal["whole", "streamed"] = "whole"  # or one decoder layer at a time
    hardware: Annotated[str, Field(min_length=1)] = "laptop-cpu"  # what `plan` reckons with
    trust_remote_code: bool = False
    budget: BudgetSettings = BudgetSettings(parameters=0.7)
    pruning: PruningSettings = PruningSettings()
    fitness: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: {"kl": 1.0})
    data: DataSettings = DataSettings()
    search: SearchSettings = SearchSettings()
    driver: DriverSettings = DriverSettings()
    front: FrontSettings = FrontSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()

    @field_validator("fitness")
    @classmethod
    def _known_fitness(cls, weights: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in weights if name not in FITNESSES]
        if unknown or not any(weights.values()):
            raise ValueError(
                f"got {weights}; allowed: weights of at least 0, one of them above, "
                f"over {', '.join(FITNESSES)}"
            )
        return weights

    @model_validator(mode="after")
    def _fitness_has_data(self) -> Self:
        if self.fitness.get("accuracy") and not self.data.choices:
            raise ValueError("data.choices: got 0; allowed: at least 1 for the accuracy fitness")
        return self

    @model_validator(mode="after")
    def _windows_compare_ratios(self) -> Self:
        if self.search.window is not None and self.fitness.get("accuracy"):
            raise ValueError(
                f"search.window: got {self.search.window}; allowed beside the accuracy fitness: "
                "null, because plans of different windows are compared by ratios"
            )
        return self

    @model_validator(mode="after")
    def _proposals_have_a_driver(self) -> Self:
        if self.search.asks_llm and self.driver.kind == "none":
            name = self.search.allocator
            raise ValueError(f"driver.kind: got 'none'; search.allocator {name} needs a driver")
        return self

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> Self:
        cap, chain = self.search.cost, self.driver.chain
        if cap is not None and self.search.asks_llm and not any(_has_costs(x) for x in chain):
            raise ValueError(
                f"search.cost: got {cap}, and no driver has a price; allowed with a driver.price"
            )
        return self

    @model_validator(mode="after")
    def _allocator_has_its_facts(self) -> Self:
        asked = {"search.allocator": (self.search.allocator,), "search.starts": self.search.starts}
        for setting, names in asked.items():
            found = [x for x in names if x in ("owl", "flap_global")]
            if found and self.pruning.statistics != "frozen":
                raise ValueError(
                    f"pruning.statistics: got 'sequential'; allowed with {setting} {found[0]}: "
                    "frozen"
                )
        return self

    @model_validator(mode="after")
    def _streaming_has_what_it_can(self) -> Self:
        if self.memory == "streamed" and (complaint := unstreamable(self)):
            raise ValueError(f"{complaint} with memory streamed")
        return self

    @model_validator(mode="after")
    def _front_is_of_the_kind(self) -> Self:
        targets, kind = self.front.targets, self.budget.kind
        if self.front.pick != "budget" and not targets:
            raise ValueError(
                f"front.pick: got {self.front.pick!r}; allowed without front.targets: budget"
            )
        if kind == "speedup":
            wrong = [x for x in targets if x < 1]
            allowed = "speedups of at least 1"
        elif self.budget.is_share:
            wrong = [x for x in targets if x > 1]
            allowed = "shares up to 1"
        else:
            wrong, allowed = list(targets), "none, because it is a total"
        if wrong:
            raise ValueError(
                f"front.targets: got {wrong[0]:g}; allowed beside budget.{kind} "
                f"{self.budget.target:g}: {allowed}"
            )
        return self

    @model_validator(mode="after")
    def _target_is_known(self) -> Self:
        if self.pruning.target is not None:
            Alignment.of(self.pruning.target)
        return self

    def alignment(self, *, on_gpu: bool) -> Alignment:
        """Return what `pruning.target` asks of widths, or else what the device is fast at."""
        return Alignment.of(self.pruning.target or ("tensor-cores" if on_gpu else "cpu"))

    @property
    def text_terms(self) -> tuple[str, ...]:
        """Terms of the fitness that are losses on text."""
        return tuple(x for x in TEXT_TERMS if self.fitness.get(x))

    @property
    def measures_slopes(self) -> bool:
        """Whether the search goes by slopes: of text terms, and of a model that is ranked once."""
        known = bool(self.text_terms) and self.pruning.statistics == "frozen"
        return known and self.search.uses_slopes

    @property
    def weighs_latency(self) -> bool:
        """Whether the search itself depends on predicted times."""
        return self.budget.kind == "speedup" or bool(self.fitness.get("latency"))

    @property
    def workload(self) -> Workload:
        """What predicted times are of: a speedup's workload, else the prefill of one text."""
        if self.budget.kind == "speedup":
            return self.budget.workload
        return Workload("prefill", 1, self.data.length)

    @property
    def judged(self) -> EvaluationSettings:
        """How the finished model is judged: where a speedup was asked, its speed at that load."""
        if self.budget.kind != "speedup":
            return self.evaluation
        asked = self.budget.workload
        speed = {"batch": asked.batch, "prompt_tokens": asked.tokens}
        return self.evaluation.model_copy(
            update={"speed": self.evaluation.speed.model_copy(update=speed)}
        )

    def to_yaml(self) -> str:
        """Return the whole tree as YAML; `parse_config` of it gives an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _has_costs(endpoint: Endpoint) -> bool:
    """Return whether calls of an endpoint are charged for; a recording has costs of its own."""
    return endpoint.kind == "replay" or endpoint.price.of(1, 1) > 0


def unstreamable(config: RunConfig) -> str | None:
    """Return the first setting that needs the whole dense model in memory, None where none does."""
    asks, own = config.search.asks_llm, (None, config.model)
    places = ("driver", *(f"driver.fallbacks.{i}" for i in range(len(config.driver.fallbacks))))
    pairs = zip(places, config.driver.chain, strict=True)
    # Where the first driver of each kind stands that is the model itself.
    drivers = {x.kind: place for place, x in reversed(list(pairs)) if asks and x.model in own}
    needs: tuple[tuple[str, object, str, bool], ...] = (
        ("pruning.statistics", "sequential", "frozen", config.pruning.statistics != "frozen"),
        ("pruning.calibration", "auto", "all", config.pruning.calibration != "all"),
        ("data.choices", config.data.choices, "0", config.data.choices > 0),
        (
            f"{drivers.get('embedded')}.kind",
            "embedded",
            "another, or another model beside it",
            "embedded" in drivers,
        ),
        (
            f"{drivers.get('vllm')}.model",
            None,
            "a folder or another model",
            "vllm" in drivers and not Path(config.model).is_dir(),
        ),
    )
    found = (f"{name}: got {got}; allowed: {allowed}" for name, got, allowed, bad in needs if bad)
    return next(found, None)


def load_config(
    path: Path,
    *,
    model: str | None = None,
    budget: str | None = None,
    pick: str | None = None,
    settings: Sequence[str] = (),
) -> RunConfig:
    """Return the configuration of file `path`: recipe, then the file, then the command line.

    A recipe that the command line names takes the place of the file's and goes over the file.

    Args:
        path: YAML file.
        model: takes the place of the file's model.
        budget: `kind=value`, takes the place of the whole budget.
        pick: takes the place of `front.pick`.
        settings: `dotted.name=value`, values parsed as YAML, laid on top in order.

    Raises:
        ValueError: one line for each thing that is wrong, with what is allowed and where.
    """
    file = _run_file(path), str(path)
    own = _layers([file], model, budget, settings)
    origin = own.origin("recipe", str(path))
    recipe = _recipe_path(own.data.get("recipe", "best"), origin)
    defaults = _recipe_defaults(recipe), str(recipe)
    below = [file, defaults] if origin == _option("recipe") else [defaults, file]
    layers = _layers(below, model, budget, settings)
    if pick is not None:
        layers.set("front.pick", pick, "--pick")
    return _validated(layers, str(path))


def parse_config(text: str, where: str) -> RunConfig:
    """Return the configuration that `RunConfig.to_yaml` wrote; no recipe is read.

    Raises:
        ValueError: one line for each thing that is wrong.
    """
    layers = Layers()
    layers.add(checked_mapping(parse_yaml(text, where), where), where)
    return _validated(layers, where)


def _layers(
    files: Sequence[tuple[dict[str, Any], str]],
    model: str | None,
    budget: str | None,
    settings: Sequence[str],
) -> Layers:
    """Return the settings of files, later over earlier, and the command line's on top."""
    layers = Layers()
    for data, where in files:
        layers.add(data, where)
    if model is not None:
        layers.add({"model": model}, "--model")
    if budget is not None:
        name, value = _assignment(budget, "--budget")
        layers.add({"budget": {name: value}}, "--budget")
    for text in settings:
        name, value = _assignment(text, "--set")
        layers.set(name, value, _option(name))
    return layers


def _run_file(path: Path) -> dict[str, Any]:
    """Return the settings of a run's file.

    Raises:
        ValueError: it is the file of an experiment.
    """
    data = read_mapping(path)
    if "base" in data and "model" not in data:
        raise ValueError(f"{path}: an experiment; `selfpruner experiment {path}` runs it")
    return data


def _option(name: str) -> str:
    """Return what the command line calls a setting."""
    return f"--set {name}"


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
