"""Settings of the search and of its driver: frozen, unknown keys are errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

AllocatorName = Literal["llm", "evolution", "random", "uniform", "uniform_mlp", "heuristic"]
Granularity = Literal["layer", "block"]

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SearchSettings(BaseModel):
    """How plans are proposed and when the search ends."""

    model_config = _STRICT

    allocator: AllocatorName = Field("llm", description="who proposes plans")
    strategy: str = Field(
        "moves",
        min_length=1,
        description="prompts of the llm allocator: a name under prompts/strategies or a folder",
    )
    granularity: Granularity = Field(
        "block", description="one rate per layer, or one per attention block and one per MLP"
    )
    population: int = Field(
        12, ge=1, le=10_000, description="plans in the first generation and surviving candidates"
    )
    crossover: int = Field(4, ge=0, le=10_000, description="offspring of two a generation")
    mutate: int = Field(8, ge=0, le=10_000, description="offspring of one a generation")
    evaluations: int = Field(
        120, ge=1, le=1_000_000, description="limit on scored distinct plans, all generations"
    )
    tokens: int | None = Field(
        None, ge=0, description="limit on prompt plus reply tokens of the LLM; null: none"
    )
    seconds: float | None = Field(
        None, gt=0, description="limit on seconds, asked before each generation; null: none"
    )
    classical_share: float = Field(
        0.0, ge=0, le=1, description="share of every operator's proposals made without the LLM"
    )
    seed_plan: bool = Field(True, description="one heuristic plan in the first generation")
    min_rate: float = Field(0.0, ge=0, lt=1, description="least removed share of a block")
    max_rate: float = Field(0.9, gt=0, le=1, description="largest removed share of a block")
    shown: int = Field(3, ge=1, le=100, description="candidates listed in a prompt")
    finalists: int = Field(
        3, ge=1, le=1000, description="best candidates handed back for scoring on fresh tokens"
    )

    @model_validator(mode="after")
    def _has_a_way_forward(self) -> SearchSettings:
        if self.min_rate > self.max_rate:
            raise ValueError(
                f"search.min_rate: got {self.min_rate}, allowed 0 to max_rate {self.max_rate}"
            )
        if self.crossover + self.mutate == 0:
            raise ValueError("search.mutate: got 0 with crossover 0, one of them must be above 0")
        return self


class DriverSettings(BaseModel):
    """Which LLM proposes, and how it is sampled."""

    model_config = _STRICT

    kind: Literal["embedded", "none"] = Field(
        "embedded", description="in this process, or no LLM at all"
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="packaged name, folder, file or hub id; null: the pruned one",
    )
    temperature: float = Field(0.7, ge=0, le=2, description="0 takes the likeliest token")
    batch: int = Field(8, ge=1, le=1024, description="requests decoded at once")
    max_tokens: int = Field(512, ge=16, le=32_768, description="longest reply, in tokens")
