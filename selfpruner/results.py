"""The numbers of one run: `results.json` as frozen models (schema version 1).

None stands only where a number may honestly be missing: tasks skipped, no driver, a perplexity
that overflowed. Accuracies are 0 to 1, times seconds unless the name says `ms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from agent.racing import NOT_FINITE
from pruning.budget import BudgetKind
from selfpruner.run_folder import write_whole

NORMALISED = frozenset({"hellaswag", "arc_challenge", "openbookqa"})
Origin = Literal["llm", "llm_repaired", "fallback", "classical", "heuristic"]


def _finite(value: Any) -> Any:
    """Return None for an infinite or undefined number: JSON has no word for either.

    A search's stand-in for one is none, too.
    """
    return None if isinstance(value, float) and not abs(value) < NOT_FINITE else value


Finite = Annotated[float | None, BeforeValidator(_finite)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

_FEWEST_ITEMS = 10  # of a task; of fewer no interval is believed


class Record(BaseModel):
    """Base of every part: frozen, no unknown keys, no silent conversion, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelNumbers(Record):
    """The model and its total parameters, embedding and head included."""

    name: str
    family: str
    parameters_dense: PositiveInt
    parameters_pruned: PositiveInt


class BudgetNumbers(Record):
    """What was asked and reached, in one unit: a share of the blocks, a total or a speedup."""

    kind: BudgetKind
    target: PositiveFloat
    achieved: PositiveFloat


class SearchNumbers(Record):
    """How the plan was found. `driver` and `strategy` are None where no LLM took part.

    `placebo` is what was hidden from the LLM, None where nothing was: such a run is a control.

    `evaluations` are plans scored, `equivalents` full evaluations charged for them (None in results
    of a version without racing), of which `slopes` went into slopes. `llm_failures` are calls
    without a reply, `duplicates` replies with a plan known already; `stopped` names the limit that
    ended the search. `best_fitness` is the lowest on search tokens; of the plan that was selected,
    `selected_fitness` is on search tokens (None in files older than it) and `selection_fitness` on
    fresh ones. `fitness` is the weight of each of its terms, `predicted` what predicted times and
    speedups are of (None in files older than them).
    """

    allocator: str
    driver: str | None
    strategy: str | None
    placebo: Literal["layers", "fitness", "name"] | None = None
    evaluations: NonNegativeInt
    equivalents: NonNegativeFloat | None = None
    slopes: NonNegativeFloat = 0.0
    llm_calls: NonNegativeInt
    llm_tokens: NonNegativeInt
    llm_cost: NonNegativeFloat
    llm_failures: NonNegativeInt
    duplicates: NonNegativeInt
    fallbacks: NonNegativeInt
    stopped: str
    best_fitness: Finite
    selected_fitness: Finite = None
    selection_fitness: Finite
    fitness: dict[str, float] | None = None
    predicted: str | None = None
    wall_seconds: NonNegativeFloat


class TaskNumbers(Record):
    """One benchmark: `stderr` belongs to the figure that enters the mean, None for one item."""

    acc: Share
    acc_norm: Share | None
    stderr: NonNegativeFloat | None
    n: PositiveInt
    split: str


class QualityNumbers(Record):
    """Perplexity by text and accuracy by task of one model. `mean` is None without tasks."""

    perplexity: dict[str, Finite]
    tasks: dict[str, TaskNumbers]
    mean: Share | None

    def figure(self, task: str) -> float:
        """Return the accuracy of `task` that enters the mean: acc_norm for `NORMALISED`."""
        numbers = self.tasks[task]
        if task in NORMALISED and numbers.acc_norm is not None:
            return numbers.acc_norm
        return numbers.acc


class Difference(Record):
    """Mean accuracy, pruned minus dense, paired by item, in percentage points.

    `mcnemar` is the exact two-sided p value by task; None in files older than it.
    """

    points: float
    ci95: Annotated[tuple[float, float], Field(strict=False)]
    mcnemar: dict[str, Share] | None = None

    def resolution(self, items: Sequence[int]) -> str:
        """Return in words whether so many items, by task, tell the two models apart."""
        if float(f"{self.points:.2f}") == 0:
            return "The mean has not moved."
        change = f"The {'drop' if self.points < 0 else 'gain'} of {abs(self.points):.2f} points"
        low, high = self.ci95
        # Resampling a handful of items, or items that all agree, shows none of their variation.
        if min(items) < _FEWEST_ITEMS or low == high:
            return (
                f"{change} is not resolved: {min(items)} items of a task are too few to tell how "
                "they vary."
            )
        if low <= 0 <= high:
            return (
                f"{change} is not resolved by the {sum(items):,} items: its 95 % interval "
                "includes zero, so more items are needed to tell it from none."
            )
        return (
            f"{change} is resolved by the {sum(items):,} items: its 95 % interval leaves out zero."
        )


class Quality(Record):
    """Both models on the same items. `difference` is None without tasks."""

    dense: QualityNumbers
    pruned: QualityNumbers
    difference: Difference | None

    @property
    def resolution(self) -> str | None:
        """Whether the items tell the two models apart, in words; None without tasks."""
        if self.difference is None:
            return None
        return self.difference.resolution([x.n for x in self.pruned.tasks.values()])


class SpeedRow(Record):
    """One timing: median milliseconds of a prefill of `tokens` tokens, or of one token after it.

    `speedup` is dense over pruned; `spread` is its interquartile range over the repeats.
    """

    phase: str
    batch: PositiveInt
    tokens: PositiveInt
    dense_ms: PositiveFloat
    pruned_ms: PositiveFloat
    speedup: PositiveFloat
    spread: NonNegativeFloat


class Speed(Record):
    """All timings; no rows where speed was not measured."""

    rows: Annotated[tuple[SpeedRow, ...], Field(strict=False)]


class Memory(Record):
    """Bytes of the weights, of both models in the dtype of the exported one."""

    dense_bytes: PositiveInt
    pruned_bytes: PositiveInt


class Units(Record):
    """Units of a layer of the dense model."""

    kv_groups: PositiveInt
    q_per_group: PositiveInt
    mlp_channels: PositiveInt


class LayerUnits(Units):
    """Units that remain in layer `layer` (from 0)."""

    layer: NonNegativeInt


class HistoryRow(Record):
    """One scored candidate. `best` is the lowest fitness so far; None is a fitness not finite."""

    evaluation: NonNegativeInt
    generation: NonNegativeInt
    operator: str
    origin: Origin
    fitness: Finite
    best: Finite


class GenerationRow(Record):
    """The best plan after a generation; accuracy and speedup are None where not asked for."""

    generation: NonNegativeInt
    best_fitness: Finite
    accuracy: Share | None
    speedup: PositiveFloat | None


class FrontPoint(Record):
    """The best plan within one budget, before any refit; the dense model has target 1.

    `achieved` in the unit of the target, `speedup` and `milliseconds` predicted (the latter None in
    files older than it), `seconds` of its search, fitness on the search tokens and on fresh ones;
    `plan` as `Plan.to_json` has it.
    """

    target: PositiveFloat
    achieved: PositiveFloat
    parameters: PositiveInt
    speedup: PositiveFloat
    milliseconds: PositiveFloat | None = None
    fitness: Finite
    selection_fitness: Finite
    evaluations: NonNegativeInt
    seconds: NonNegativeFloat
    plan: Annotated[tuple[tuple[int, int, int], ...], Field(strict=False)]


class Control(Record):
    """A simple plan within the same budget, pruned by the same recipe."""

    parameters: PositiveInt
    perplexity: dict[str, Finite]


class Sample(Record):
    """One prompt, continued greedily by both models."""

    prompt: str
    dense: str
    pruned: str


class Cost(Record):
    """What the run itself took."""

    stage_seconds: dict[str, NonNegativeFloat]
    peak_memory_bytes: PositiveInt | None


class Refit(Record):
    """Fitness on selection tokens before and after the final refit, and whether it was kept."""

    kept: bool
    before: Finite
    after: Finite


class Macs(Record):
    """Multiply-accumulates of one forward pass over `tokens` tokens."""

    dense: PositiveInt
    pruned: PositiveInt
    tokens: PositiveInt


class Evaluation(Record):
    """How quality was measured. `samples` is items a task, None for whole sets."""

    batch_size: PositiveInt
    samples: PositiveInt | None
    perplexity_length: dict[str, PositiveInt]
    mean_convention: str


class Results(Record):
    """Every number of a run, with the names of `results.json`. `refit` is None when not tried."""

    schema_version: Literal[1]
    model: ModelNumbers
    budget: BudgetNumbers
    recipe: str
    search: SearchNumbers
    quality: Quality
    speed: Speed
    memory: Memory
    units: Annotated[tuple[LayerUnits, ...], Field(strict=False, min_length=1)]
    units_dense: Units
    history: Annotated[tuple[HistoryRow, ...], Field(strict=False)]
    generations: Annotated[tuple[GenerationRow, ...], Field(strict=False)]
    front: Annotated[tuple[FrontPoint, ...], Field(strict=False)]
    controls: dict[str, Control]
    samples: Annotated[tuple[Sample, ...], Field(strict=False)]
    cost: Cost
    refit: Refit | None
    warnings: Annotated[tuple[str, ...], Field(strict=False)]
    macs: Macs
    evaluation: Evaluation
    environment: dict[str, JsonValue]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep the same, without which no stock architecture holds the model."""
        return len({(x.kv_groups, x.q_per_group, x.mlp_channels) for x in self.units}) == 1

    def save(self, path: Path) -> None:
        """Write the results as indented JSON, in one step."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Return the results in `path`.

        Raises:
            ValueError: the file is missing, is no JSON, or departs from the schema; one line
                that names the file, the place and what was got.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; has the run finished?") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"{path}: cannot read the results of a run: {reason}") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Return the first problem, its place and how many more there are, in one line."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    got = repr(first["input"])
    shown = got if len(got) <= 60 else got[:57] + "..."
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {first['msg']}; got {shown}{more}"
