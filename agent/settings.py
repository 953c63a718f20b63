"""Settings of the search and of its driver: frozen, unknown keys are errors."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal, Self, cast, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Operators = Literal["random", "random_seeded", "genetic", "evolution", "cma", "guided", "descent"]
AllocatorName = Literal[
    "llm",
    "hybrid",
    "random",
    "random_seeded",
    "genetic",
    "evolution",
    "cma",
    "guided",
    "descent",
    "uniform",
    "uniform_mlp",
    "heuristic",
    "knapsack",
    "owl",
    "flap_global",
]
SimplePlan = Literal["uniform", "uniform_mlp", "heuristic", "knapsack", "owl", "flap_global"]
Granularity = Literal["layer", "block"]
DriverKind = Literal["embedded", "api", "vllm", "replay", "none"]
Placebo = Literal["none", "layers", "fitness", "name"]
Structured = Literal["auto", "json_schema", "json_object", "text"]

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class RacingSettings(BaseModel):
    """When a plan is scored no further because another one is better."""

    model_config = _STRICT

    rounds: tuple[float, ...] = Field(
        (0.09, 0.15, 0.25, 0.375, 0.56, 1.0),
        min_length=1,
        description="shares of the sequences that plans have seen after each round, up to 1; at "
        "least one new sequence a round",
    )
    bound: float | None = Field(
        1.5,
        gt=0,
        description="standard errors by which a plan must be worse than the best one to drop "
        "out; null: none drops out for that",
    )
    survivors: tuple[int, ...] | None = Field(
        None, description="plans left after each round but the last, at most; null: any number"
    )

    @property
    def is_off(self) -> bool:
        """Whether every plan sees all sequences."""
        return self.bound is None and self.survivors is None

    @model_validator(mode="after")
    def _leads_to_the_end(self) -> Self:
        rising = all(x < y for x, y in pairwise((0.0, *self.rounds)))
        if not rising or self.rounds[-1] != 1:
            raise ValueError(
                f"search.racing.rounds: got {self.rounds}, want rising shares from above 0 to 1"
            )
        left = self.survivors
        if left is None:
            return self
        falling = all(x >= y for x, y in pairwise((*left, 1)))
        if not falling or len(left) != len(self.rounds) - 1:
            raise ValueError(
                f"search.racing.survivors: got {left}, want {len(self.rounds) - 1} counts, none "
                "above the one before it or below 1"
            )
        return self


class SearchSettings(BaseModel):
    """How plans are proposed and when the search ends."""

    model_config = _STRICT

    allocator: AllocatorName = Field("llm", description="who proposes plans")
    strategy: str = Field(
        "moves",
        min_length=1,
        description="prompts of the llm allocator: a name under prompts/strategies or a folder",
    )
    placebo: Placebo = Field(
        "none",
        description="control of the llm allocator; what prompts hide from the LLM: the places of "
        "layers, the fitness of plans (told in a random order) or the model's name",
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
        120,
        ge=1,
        le=1_000_000,
        description="limit on full evaluations, all generations; a plan that drops out of a race "
        "counts for the share of the sequences that it has seen, the plan that a window compares "
        "with counts again in every window, and so do slopes and probes",
    )
    racing: RacingSettings = Field(RacingSettings(), description="when a plan is scored no further")
    probes: int = Field(
        0,
        ge=0,
        description="sequences on which the dense model is scored with one block cut at a time, "
        "before the search; counted as evaluations, 0: no probes",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="sequences on which each generation is scored, its own ones, beside the first "
        "plan, in evolution and descent the best one; one evaluation is a plan on so many; null: "
        "every plan on all sequences",
    )
    slopes: int = Field(
        4,
        ge=1,
        description="descent: sequences on which the slopes of the best plan are measured before "
        "each generation; one counts as five sequences of a plan",
    )
    calls: int | None = Field(
        None, ge=0, description="limit on calls of the LLM, failed ones included; null: none"
    )
    tokens: int | None = Field(
        None, ge=0, description="limit on prompt plus reply tokens of the LLM; null: none"
    )
    cost: float | None = Field(
        None, ge=0, description="limit on money, in the currency of driver.price; null: none"
    )
    seconds: float | None = Field(
        None,
        gt=0,
        description="limit on seconds, asked before each call of the LLM and after each "
        "generation; null: none",
    )
    operators: Operators = Field(
        "genetic",
        description="classical operators of hybrid, and of llm where a reply cannot be used",
    )
    llm_share: float | Literal["learned"] = Field(
        0.5, description="hybrid: share of proposals that the LLM makes, or learned as it goes"
    )
    seed_plan: bool = Field(True, description="one heuristic plan in the first generation")
    starts: tuple[SimplePlan, ...] = Field(
        (),
        description="further plans that the first generation begins with, those of allocators "
        "without a search",
    )
    min_rate: float = Field(0.0, ge=0, lt=1, description="least removed share of a block")
    max_rate: float = Field(0.9, gt=0, le=1, description="largest removed share of a block")
    shown: int = Field(
        3,
        ge=1,
        le=100,
        description="candidates listed in a prompt, and parents where an LLM is asked, which "
        "chooses them from twice as many",
    )
    finalists: int = Field(
        3,
        ge=1,
        le=1000,
        description="best candidates that are scored on fresh tokens, beside the first plan",
    )

    @field_validator("llm_share", mode="before")
    @classmethod
    def _share_or_learned(cls, share: object) -> object:
        if share == "learned":
            return share
        if isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1:
            return share
        raise ValueError(f"got {share!r}; allowed: learned, or 0 to 1")

    @property
    def asks_llm(self) -> bool:
        """Whether an LLM takes part."""
        return self.allocator in ("llm", "hybrid") and self.share_asked != 0

    @property
    def classical(self) -> Operators:
        """Who proposes where no LLM does; meaningless for an allocator of one fixed plan."""
        for name in get_args(Operators):
            if name == self.allocator:
                return cast(Operators, name)
        return self.operators

    @property
    def is_elitist(self) -> bool:
        """Whether windows compare a generation with the best plan so far, not with the first."""
        return self.classical in ("evolution", "descent")

    @property
    def searches(self) -> bool:
        """Whether scores lead to other plans: not for an allocator of one fixed plan."""
        return self.allocator not in get_args(SimplePlan)

    @property
    def uses_slopes(self) -> bool:
        """Whether slopes are measured: there is a search whose classical half descends."""
        return self.searches and self.classical == "descent" and self.share_asked != 1

    @property
    def share_asked(self) -> float | Literal["learned"]:
        """The LLM's share of proposals: all of llm's, none of the classical allocators'."""
        if self.allocator == "hybrid":
            return self.llm_share
        return 1.0 if self.allocator == "llm" else 0.0

    @model_validator(mode="after")
    def _has_a_way_forward(self) -> SearchSettings:
        if self.min_rate > self.max_rate:
            raise ValueError(
                f"search.min_rate: got {self.min_rate}, allowed 0 to max_rate {self.max_rate}"
            )
        if self.crossover + self.mutate == 0:
            raise ValueError("search.mutate: got 0 with crossover 0, one of them must be above 0")
        if self.mutate == 0 and self.population == 1:
            raise ValueError(
                "search.population: got 1, allowed with mutate 0: at least two parents"
            )
        begun = int(self.seed_plan) + len(self.starts)
        if begun > self.population:
            raise ValueError(
                f"search.population: got {self.population}, allowed with seed_plan "
                f"{self.seed_plan} and {len(self.starts)} starts: at least {begun}"
            )
        return self


class Price(BaseModel):
    """What an endpoint charges for a million tokens, in any one currency."""

    model_config = _STRICT

    prompt: float = Field(0.0, ge=0, description="per million prompt tokens")
    completion: float = Field(0.0, ge=0, description="per million reply tokens")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the money for so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Endpoint(BaseModel):
    """Which LLM proposes, how it is reached and how it is sampled."""

    model_config = _STRICT

    kind: DriverKind = Field(
        "embedded",
        description="in this process, an OpenAI-compatible endpoint, a vLLM server of our own, "
        "a recorded llm.jsonl, or no LLM at all",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="embedded, vllm: packaged name, folder, file or hub id, null: the pruned "
        "one; api: the endpoint's name of the model, null: the first that it lists",
    )
    temperature: float = Field(0.7, ge=0, le=2, description="0 takes the likeliest token")
    batch: int = Field(8, ge=1, le=1024, description="requests decoded, or in flight, at once")
    max_tokens: int = Field(512, ge=16, le=32_768, description="longest reply, in tokens")
    base_url: str | None = Field(
        None, min_length=1, description="api: address of the endpoint, such as http://host:8000/v1"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="api: environment variable that holds the key; may be unset; vllm: only where "
        "another one is named",
    )
    structured: Structured = Field(
        "auto", description="api, vllm: how JSON is asked for; auto: the strictest that works"
    )
    timeout: float = Field(120.0, gt=0, description="api, vllm: seconds for one call")
    tries: int = Field(6, ge=1, le=100, description="api, vllm: calls for one reply at most")
    patience: float = Field(
        300.0, gt=0, description="api, vllm: seconds after which a reply is not tried for again"
    )
    price: Price = Field(Price(), description="what the endpoint charges")
    port: int | None = Field(
        None, ge=1, le=65_535, description="vllm: adopt the server there, or start one; null: free"
    )
    python: str | None = Field(
        None, min_length=1, description="vllm: Python with vLLM; null: the command vllm"
    )
    context: int = Field(4096, ge=256, description="vllm: longest prompt plus reply, in tokens")
    eager: bool = Field(
        False, description="vllm: compile nothing: starts sooner, answers a fifth slower"
    )
    gpu_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="vllm: share of the memory of its GPU that a server of our own takes; choose "
        "less where the run computes there too; null: what vLLM takes, nine tenths",
    )
    start_seconds: float = Field(600.0, gt=0, description="vllm: longest wait for the server")
    recording: str | None = Field(None, min_length=1, description="replay: path of an llm.jsonl")

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("allowed: an http or https address")
        try:
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"allowed after the host: a port; {error}") from None
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "allowed: an address without user, password or query; key_variable names a key"
            )
        return url

    @field_validator("key_variable")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if not _VARIABLE.fullmatch(name):
            raise ValueError("allowed: the NAME of an environment variable, in capitals")
        return name

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind == "api" and self.base_url is None:
            raise ValueError("driver.base_url: missing; driver.kind api needs an address")
        if self.kind == "replay" and self.recording is None:
            raise ValueError("driver.recording: missing; driver.kind replay needs an llm.jsonl")
        return self


class DriverSettings(Endpoint):
    """The LLM that is asked, and what happens when it gives up."""

    fallbacks: tuple[Endpoint, ...] = Field(
        (), description="drivers that take over, in order, when this one gives up"
    )
    when_down: Literal["stop", "classical"] = Field(
        "stop",
        description="when all drivers gave up: stop, to be resumed, or go on without an LLM",
    )

    @field_validator("fallbacks")
    @classmethod
    def _each_answers(cls, fallbacks: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        if any(x.kind == "none" for x in fallbacks):
            raise ValueError("kind none answers nothing; driver.when_down: classical goes on so")
        return fallbacks

    @property
    def chain(self) -> tuple[Endpoint, ...]:
        """This driver and its fallbacks, in order."""
        return (self, *self.fallbacks)
