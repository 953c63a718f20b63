"""What changes in a search (plain JSON, checkpointed) and what does not (handles)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from agent import allocators
from agent.allocators import Sensitivity, UnitScores
from agent.budget import Spending
from agent.disguise import Disguise
from agent.drivers.driver import Driver
from agent.knapsack import knapsack
from agent.ledger import Ledger, Probe
from agent.loss_curves import loss_curves
from agent.parse import Block, Bounds
from agent.projection import Levels, Space
from agent.settings import DriverSettings, SearchSettings, SimplePlan
from prompts.library import Strategy
from pruning.budget import Budget
from pruning.plan import Grid, Plan

if TYPE_CHECKING:
    from agent.surrogate import Surrogate

Score = Callable[[Sequence[Plan], Sequence[int]], NDArray[np.float64]]
Assess = Callable[[Plan], dict[str, float]]
Slopes = Callable[[Plan, Sequence[int]], Sequence[tuple[Sequence[float], Sequence[float]]]]

MAX_MLP_MOVE = 8


class SearchState(TypedDict):
    """Where a search stands; the ledger holds the rest.

    Attributes:
        generation: the one being made, from 0.
        pending: proposals that wait for scores, as JSON.
        scores: one `{fitness, stderr, sequences, of, values, seconds}` for each pending proposal.
        parents: ids of the selected candidates.
        stopped: why the search ends, or None.
        seconds: spent up to the last node that ended.
    """

    generation: int
    pending: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    parents: list[int]
    stopped: str | None
    seconds: float


@dataclass(frozen=True)
class SearchContext:
    """Handles of one search.

    Attributes:
        settings: limits, sizes and allocator.
        driver_settings: sampling of the driver.
        seed: with the replies of the driver, all that randomness depends on.
        grid, budget: the allowed plans.
        score: plans and sequence indices to fitness per sequence, lower is better.
        sequences: indices that `score` is asked for, in the order in which plans meet them.
        sensitivity: `[layer][block][level]` cut errors, block 0 attention and 1 MLP.
        assess: accuracy (0 to 1) and speedup (above 0) of the best plan of a generation, or None.
        driver, strategy: needed by the llm allocator only.
        ledger: of the run folder.
        clock: seconds that only grow.
        unit_latency: microseconds of a whole forward that one attention unit and one MLP step
            take, or None where they were not measured.
        outliers: of every layer the share of outliers among its weighted activations, for owl.
        unit_scores: `[layer][block][unit]` standardised scores in rank order, for flap_global.
        starts: plans of this budget that the first generation begins with, after the seed plan.
        model_name: hub id or path of the model that is pruned, empty where nobody is to know.
        slopes: a plan and sequence indices to what every level of every block would add to the
            plan's fitness, to first order, `[layer][block][level]`; None where it has none.
        earlier_probes: those of another search of the same ranked model, for one without its own.
    """

    settings: SearchSettings
    driver_settings: DriverSettings
    seed: int
    grid: Grid
    budget: Budget
    score: Score
    sequences: Sequence[int]
    sensitivity: Sensitivity
    assess: Assess | None
    driver: Driver | None
    strategy: Strategy | None
    ledger: Ledger
    clock: Callable[[], float]
    unit_latency: tuple[float, float] | None = None
    outliers: Sequence[float] = ()
    unit_scores: UnitScores = ()
    starts: Sequence[Plan] = ()
    model_name: str = ""
    slopes: Slopes | None = None
    earlier_probes: Sequence[Probe] = ()

    @cached_property
    def space(self) -> Space:
        """The plans this search may visit."""
        return Space(self.grid, self.budget, self.settings.min_rate, self.settings.max_rate)

    @property
    def per_evaluation(self) -> int:
        """Sequences that a plan is scored on where it does not drop out of a race."""
        return min(self.settings.window or len(self.sequences), len(self.sequences))

    def window(self, generation: int) -> list[int]:
        """Return the sequences of a generation, in the order in which its plans meet them.

        Generations take turns through all sequences, so that no plan is chosen for its luck on
        sequences that its ancestors were chosen on.
        """
        size, count = self.per_evaluation, len(self.sequences)
        return [self.sequences[(generation * size + i) % count] for i in range(size)]

    @property
    def probes(self) -> Sequence[Probe]:
        """What is known of single cuts: measured by this search, or handed to it."""
        return self.ledger.probes() or self.earlier_probes

    @cached_property
    def disguise(self) -> Disguise:
        """What the prompts of this search hide."""
        return Disguise(self.settings.placebo, self.seed, self.space.layers)

    @cached_property
    def spending(self) -> Spending:
        """What was spent; counts from the first time it is asked for."""
        return Spending.begin(self.settings, self.ledger, self.clock)

    @cached_property
    def surrogates(self) -> dict[int, Surrogate]:
        """The surrogate of the generation being made, once it was asked for."""
        return {}

    @cached_property
    def first_plan(self) -> Levels:
        """The heuristic plan, or the uniform one where `seed_plan` is off."""
        if not self.settings.seed_plan:
            return allocators.uniform(self.space)
        return self.conform(allocators.heuristic(self.space, self.sensitivity))

    @cached_property
    def fixed_plan(self) -> Levels | None:
        """The one plan of an allocator without a search, None for the others."""
        name = self.settings.allocator
        return self.simple_plan(name) if name in get_args(SimplePlan) else None

    def simple_plan(self, name: str) -> Levels:
        """Return the plan of an allocator without a search."""
        space = self.space
        makers: dict[str, Callable[[], Levels]] = {
            "uniform": lambda: allocators.uniform(space),
            "uniform_mlp": lambda: allocators.uniform_mlp(space),
            "heuristic": lambda: self.conform(allocators.heuristic(space, self.sensitivity)),
            "knapsack": lambda: self.conform(
                knapsack(space, loss_curves(self.sensitivity, self.probes))
            ),
            "owl": lambda: allocators.owl(space, self.outliers),
            "flap_global": lambda: self.conform(allocators.flap_global(space, self.unit_scores)),
        }
        return makers[name]()

    @cached_property
    def reply_bounds(self) -> Bounds:
        """What replies of the driver may name."""
        space, settings = self.space, self.settings
        units: dict[Block, int] = {"mlp": min(MAX_MLP_MOVE, max(1, len(self.grid.mlp) - 1))}
        blocks = settings.granularity == "block"
        attention = space.bounds[0][1] - space.bounds[0][0]
        if blocks and attention > 0:
            units["attention"] = min(attention, 2)
        percent = round(100 * settings.min_rate), round(100 * settings.max_rate)
        return Bounds(space.layers, percent, units, blocks)

    def conform(self, levels: Levels) -> Levels:
        """Return `levels` with one rate a layer where the granularity asks for it."""
        return levels if self.settings.granularity == "block" else self.space.one_rate(levels)
