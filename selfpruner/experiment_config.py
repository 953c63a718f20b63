"""The file of an experiment: arms, models, budgets and seeds, and the role of every arm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from agent.settings import SearchSettings
from selfpruner.complaints import complaints
from selfpruner.config import BudgetSettings, RunConfig, load_config
from selfpruner.settings import Settings
from selfpruner.yaml_text import read_mapping

Role = Literal["classical", "llm", "placebo"]
Arm = dict[str, Any]

_SHARED = ("search.", "driver.")
_NAME = re.compile(r"[\w.+-]+")


class ExperimentConfig(Settings):
    """Arms by name, each a set of dotted settings over the base; all of them share the others."""

    base: str = Field(min_length=1, description="run configuration, a path from this file's folder")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of the searches")
    models: tuple[str, ...] = Field((), description="models to prune; none: the base's")
    budgets: tuple[BudgetSettings, ...] = Field((), description="what may remain; none: the base's")
    settings: dict[str, Any] = Field(default_factory=dict, description="over the base, all arms")
    arms: dict[str, Arm] = Field(default_factory=dict, description="search.* and driver.* only")
    matrix: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="values by setting; every combination is an arm more"
    )
    roles: dict[str, Role] = Field(
        default_factory=dict, description="of arms; those of others follow from their settings"
    )
    control: str | None = Field(
        None, description="arm that others are compared with; null: best classical"
    )


@dataclass(frozen=True)
class Experiment:
    """An experiment whose arms are resolved.

    Attributes:
        name: that of its file.
        config: the file.
        base: what all arms share.
        runs: the run of every arm, with the base's model, budget and seed.
        roles: of every arm.
        placebos: the placebos of every arm of role llm, by name.
    """

    name: str
    config: ExperimentConfig
    base: RunConfig
    runs: Mapping[str, RunConfig]
    roles: Mapping[str, Role]
    placebos: Mapping[str, tuple[str, ...]]

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are pruned."""
        return self.config.models or (self.base.model,)

    @property
    def budgets(self) -> tuple[BudgetSettings, ...]:
        """Budgets that they are pruned to."""
        return self.config.budgets or (self.base.budget,)


def load_experiment(path: Path) -> Experiment:
    """Return the experiment of a YAML file.

    Raises:
        ValueError: one line for each thing that is wrong.
    """
    data = read_mapping(path)
    if "model" in data and "base" not in data:
        raise ValueError(f"{path}: a run's configuration, want an experiment: base, arms and seeds")
    try:
        config = ExperimentConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = complaints(ExperimentConfig, error, lambda _: str(path))
        raise ValueError("\n".join(lines)) from None
    arms = _arms(config, path)
    _check_names(config, arms, path)

    def run(arm: Arm, place: str) -> RunConfig:
        settings = [f"{k}={json.dumps(v)}" for k, v in {**config.settings, **arm}.items()]
        try:
            return load_config(path.parent / config.base, settings=settings)
        except ValueError as error:
            lines = str(error).replace("--set ", "").splitlines()
            raise ValueError("\n".join(f"{path}: {place}: {line}" for line in lines)) from None

    base = run({}, "settings")
    runs = {name: run(arm, f"arms.{name}") for name, arm in arms.items()}
    roles = {name: config.roles.get(name, role_of(run.search)) for name, run in runs.items()}
    return Experiment(path.stem, config, base, runs, roles, _placebos(runs, roles))


def role_of(search: SearchSettings) -> Role:
    """Return what an arm is by its search settings."""
    if search.model_dump().get("placebo", "none") != "none":
        return "placebo"
    return "llm" if search.asks_llm else "classical"


def _arms(config: ExperimentConfig, path: Path) -> dict[str, Arm]:
    """Return the arms and the combinations of the matrix, named by their values."""
    combined = {
        "-".join(str(value) for value in values): dict(zip(config.matrix, values, strict=True))
        for values in (product(*config.matrix.values()) if config.matrix else ())
    }
    twice = sorted(set(combined) & set(config.arms))
    if twice:
        raise ValueError(f"{path}: matrix: makes the arm {twice[0]}, which stands in arms too")
    arms = {**config.arms, **combined}
    if not arms:
        raise ValueError(f"{path}: arms: got none; allowed: at least one, here or by matrix")
    for arm, settings in arms.items():
        if not _NAME.fullmatch(arm):
            raise ValueError(
                f"{path}: arms.{arm}: allowed: letters, digits, and . + - _ in the name of an arm; "
                "name it under arms instead of matrix where values hold others"
            )
        for name in settings:
            if not name.startswith(_SHARED):
                raise ValueError(
                    f"{path}: arms.{arm}: got {name}; allowed: names that start with search. or "
                    "driver., because all arms share one ranked model"
                )
    return arms


def _check_names(config: ExperimentConfig, arms: Mapping[str, Arm], path: Path) -> None:
    for place, names in (("roles", list(config.roles)), ("control", [config.control])):
        for name in names:
            if name is not None and name not in arms:
                raise ValueError(f"{path}: {place}: got {name}; allowed: {', '.join(arms)}")
    if min(config.seeds) < 0:
        raise ValueError(f"{path}: seeds: got {min(config.seeds)}; allowed: 0 and above")
    for place, values in (
        ("seeds", config.seeds),
        ("models", config.models),
        ("budgets", config.budgets),
    ):
        if len(set(values)) < len(values):
            raise ValueError(f"{path}: {place}: each may stand once")


def _placebos(
    runs: Mapping[str, RunConfig], roles: Mapping[str, Role]
) -> dict[str, tuple[str, ...]]:
    """Return by arm of role llm the placebos that differ from it in the placebo alone.

    A placebo that is no such twin of any arm is taken as one of all: doubt is not to the credit of
    the LLM.
    """

    def twins(arm: str, placebo: str) -> bool:
        pair = (runs[name].model_dump(mode="json") for name in (arm, placebo))
        one, other = ({**x, "search": {**x["search"], "placebo": None}} for x in pair)
        return bool(one == other)

    asking = [name for name, role in roles.items() if role == "llm"]
    placebos = [name for name, role in roles.items() if role == "placebo"]
    orphans = [name for name in placebos if not any(twins(arm, name) for arm in asking)]
    return {arm: tuple(x for x in placebos if x in orphans or twins(arm, x)) for arm in asking}
