"""An estimate of the demo or of a larger model, with settings changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from selfpruner.config import CONFIGS, load_config
from selfpruner.costs.estimate import CostEstimate, estimate_costs
from selfpruner.costs.hardware import load_hardware

Estimating = Callable[..., CostEstimate]


@pytest.fixture
def estimated() -> Estimating:
    """Return `(*settings, config=, hardware=, devices=, workers=) -> CostEstimate`."""

    def make(
        *settings: str,
        config: str = "demo",
        hardware: str = "laptop-cpu",
        devices: int | None = None,
        workers: int = 1,
    ) -> CostEstimate:
        run = load_config(CONFIGS / f"{config}.yaml", settings=settings)
        return estimate_costs(run, load_hardware(hardware, devices), workers)

    return make
