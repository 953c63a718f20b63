"""The estimate: stages of a run on some hardware, with their seconds, memory, tokens and money."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid
from selfpruner.config import RunConfig
from selfpruner.costs.hardware import Hardware
from selfpruner.costs.known_models import architecture_by_name
from selfpruner.costs.llm import asking
from selfpruner.costs.memory import Memory, precision_of
from selfpruner.costs.stages import RunStages, Stage


@dataclass(frozen=True)
class StageCost:
    """What one stage costs.

    Attributes:
        name: of the stage.
        seconds: wall time.
        memory: bytes on the device at the peak.
        streamed: the same with `memory: streamed`, which times nothing.
        devices_needed: devices of this kind that would hold the peak.
        tokens: that pass through a model.
        llm_tokens: prompts and replies of the LLM.
        money: of the devices, and of the LLM where it charges.
    """

    name: str
    seconds: float
    memory: Memory
    streamed: Memory
    devices_needed: int
    tokens: int
    llm_tokens: int
    money: float


@dataclass(frozen=True)
class CostEstimate:
    """What a run costs.

    Attributes:
        model: its name.
        hardware: it runs on.
        parameters_dense, parameters_pruned: of the whole model.
        weight_bytes: of the dense model in the precision of the run.
        export_bytes: of the exported weights.
        scratch_bytes: that a streamed run keeps on disk until it has finished.
        evaluations: full ones of the search.
        llm_calls: of the search.
        stages: in order.
    """

    model: str
    hardware: Hardware
    parameters_dense: int
    parameters_pruned: int
    weight_bytes: float
    export_bytes: float
    scratch_bytes: float
    evaluations: int
    llm_calls: int
    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def money(self) -> float:
        """Money for all stages."""
        return sum(stage.money for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens through models in all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def llm_tokens(self) -> int:
        """Tokens of the LLM."""
        return sum(stage.llm_tokens for stage in self.stages)

    @property
    def peak(self) -> StageCost:
        """The stage that holds the most."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    def too_large(self) -> list[StageCost]:
        """Return the stages that do not fit one device, which is all that the program uses."""
        return [stage for stage in self.stages if stage.devices_needed > 1]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: bytes, seconds, tokens, money in the hardware's currency."""
        return {
            "schema_version": 1,
            "model": self.model,
            "hardware": self.hardware.model_dump(mode="json"),
            "parameters": {"dense": self.parameters_dense, "pruned": self.parameters_pruned},
            "weight_bytes": self.weight_bytes,
            "export_bytes": self.export_bytes,
            "scratch_bytes": self.scratch_bytes,
            "evaluations": self.evaluations,
            "llm_calls": self.llm_calls,
            "stages": [_stage_json(stage) for stage in self.stages],
            "total": {
                "seconds": self.seconds,
                "peak_bytes": self.peak.memory.total,
                "devices_needed": self.peak.devices_needed,
                "tokens": self.tokens,
                "llm_tokens": self.llm_tokens,
                "money": self.money,
            },
        }


def estimate_costs(config: RunConfig, hardware: Hardware, workers: int = 1) -> CostEstimate:
    """Return what the run of `config` costs on `hardware`, its searches scored by `workers`.

    Raises:
        ValueError: no architecture is known for the model, the budget cannot be met, or there are
            more workers than devices; one line.
    """
    if workers > hardware.devices:
        raise ValueError(
            f"--workers: got {workers}; allowed: up to {hardware.devices}, one a device (--devices)"
        )
    architecture = architecture_by_name(config.model)
    settings = config.pruning
    grid = config.alignment(on_gpu=hardware.gpu).grid(
        architecture, settings.step, settings.attention_unit, settings.prune_attention
    )
    budget = _budget(config, architecture, grid)
    kept = min(1.0, budget.limit / budget.dense)
    precision = precision_of(config.dtype, fast_bfloat16=hardware.has_fast_bfloat16)
    llm = asking(config, grid, budget, architecture.layers)
    run, streamed = (
        RunStages(x, architecture, grid, precision, kept, llm, hardware, workers)
        for x in (config, config.model_copy(update={"memory": "streamed"}))
    )
    peaks = {stage.name: stage.memory for stage in streamed.all()}
    fixed = architecture.fixed_parameters(settings.reconstruction != "none")
    return CostEstimate(
        model=config.model,
        hardware=hardware,
        parameters_dense=architecture.total_parameters(),
        parameters_pruned=round(kept * architecture.block_parameters()) + fixed,
        weight_bytes=run.dense.weight_bytes,
        export_bytes=run.export_bytes,
        scratch_bytes=run.memory.scratch(),
        evaluations=run.evaluations,
        llm_calls=llm.calls,
        stages=tuple(_cost(x, peaks.get(x.name, Memory()), hardware) for x in run.all()),
    )


def _budget(config: RunConfig, architecture: Architecture, grid: Grid) -> Budget:
    """Return the budget; for a speedup, which only a stopwatch knows, that share of the bytes.

    Raises:
        ValueError: it cannot be met.
    """
    asked, kind, target = config.budget, config.budget.kind, config.budget.target
    if asked.kind == "speedup":
        kind, target = "bytes", 1 / asked.target
    try:
        return Budget.of(
            architecture,
            grid,
            kind,
            target,
            correction_biases=config.pruning.reconstruction != "none",
            tokens=config.data.length,
            cached_tokens=asked.cached_tokens,
            bytes_per_weight=4 if config.export.dtype == "float32" else 2,
        )
    except ValueError as error:
        if kind == asked.kind:
            raise
        raise ValueError(f"budget.speedup: got {asked.target:g}, taken for {error}") from error


def _cost(stage: Stage, streamed: Memory, hardware: Hardware) -> StageCost:
    seconds = sum(work.seconds(hardware) for work in stage.works)
    rent = seconds / 3600 * hardware.price.hour * hardware.devices
    return StageCost(
        name=stage.name,
        seconds=seconds,
        memory=stage.memory,
        streamed=streamed,
        devices_needed=devices_needed(stage.memory.total, hardware),
        tokens=round(stage.tokens),
        llm_tokens=stage.llm_tokens,
        money=rent + stage.llm_cost,
    )


def devices_needed(peak: float, hardware: Hardware) -> int:
    """Return how many devices hold `peak` bytes, were it spread evenly; at least 1."""
    return max(1, math.ceil(peak / hardware.usable_bytes))


def _stage_json(stage: StageCost) -> dict[str, Any]:
    return {
        "name": stage.name,
        "seconds": stage.seconds,
        "peak_bytes": stage.memory.total,
        "peak_bytes_if_streamed": stage.streamed.total,
        "memory": asdict(stage.memory),
        "devices_needed": stage.devices_needed,
        "tokens": stage.tokens,
        "llm_tokens": stage.llm_tokens,
        "money": stage.money,
    }
