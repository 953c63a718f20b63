"""Settings refuse what makes no sense, by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from agent.budget import Spending
from agent.ledger import Ledger
from agent.settings import DriverSettings, RacingSettings, SearchSettings


@pytest.mark.parametrize(
    "values",
    [
        {"popsize": 3},
        {"population": 0},
        {"allocator": "magic"},
        {"llm_share": 1.5},
        {"llm_share": "guessed"},
        {"placebo": "sugar"},
        {"seconds": float("nan")},
        {"min_rate": 0.5, "max_rate": 0.4},
        {"crossover": 0, "mutate": 0},
        {"evaluations": 0},
        {"population": 1, "mutate": 0},
        {"population": 2, "starts": ("uniform", "knapsack")},
    ],
)
def test_search_settings_refuse(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SearchSettings(**values)


def test_driver_settings_refuse() -> None:
    for values in ({"temperature": 2.5}, {"batch": 0}, {"kind": "api"}, {"key": "x"}):
        with pytest.raises(ValidationError):
            DriverSettings(**values)


def test_every_field_is_documented_and_frozen() -> None:
    for model in (SearchSettings, RacingSettings, DriverSettings):
        for name, field in model.model_fields.items():
            documented = field.description or name in ("kind",)
            assert documented, name
    with pytest.raises(ValidationError):
        SearchSettings().population = 5


def test_seconds_count_earlier_processes(tmp_path: Any) -> None:
    times = iter([100.0, 103.0])
    spending = Spending.begin(SearchSettings(), Ledger(tmp_path), lambda: next(times))
    assert spending.seconds == 3.0
