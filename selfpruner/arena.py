"""Where plans compete: the model that runs as any plan, and what judges them during a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from agent.allocators import Sensitivity
from evaluators.choices import ChoiceItem, EncodedChoices, encode_choices
from pruning.budget import Budget
from pruning.elastic import Prunable
from pruning.plan import Plan
from pruning.ranking import order_hash
from pruning.slopes import Slopes
from pruning.spool import Spool
from selfpruner.config import RunConfig
from selfpruner.data import load_choice_items
from selfpruner.fitness import Fitness
from selfpruner.latency_table import Detail, LatencyTable
from selfpruner.profiling import known_table, store_table, stored_table
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.sharing import SharedFitness
from selfpruner.workbench import Workbench, lent_ranking, rank


@dataclass(frozen=True)
class Arena:
    """A ranked model and its judges; searches of one model and recipe may share it.

    Attributes:
        bench: the dense model and its texts.
        prunable: the model that runs as any plan.
        errors: cut errors `[layer][block][level]`.
        score: fitness on the search tokens, here or by workers.
        selection: the same fitness on the selection tokens.
        speed: predicted times.
    """

    bench: Workbench
    prunable: Prunable
    errors: Sensitivity
    score: Fitness | SharedFitness
    selection: Fitness
    speed: LatencyTable

    @classmethod
    def open(
        cls, bench: Workbench, folder: RunFolder, progress: Progress, lent: Path | None = None
    ) -> Self:
        """Return the arena of `folder`: its ranking and its timing are those that it began with.

        `lent` is a ranking that another process has written down; None ranks here.

        Raises:
            ValueError: the ranking comes out otherwise than the stored one, or there is none.
        """
        prunable, errors = rank(bench, progress) if lent is None else lent_ranking(bench, lent)
        _fix_order(prunable, errors, bench, folder)
        speed = _table(bench, folder, progress)
        choices = _choices(bench)
        score, selection = (
            Fitness(
                prunable,
                bench.model,
                bench.family,
                bench.config.fitness,
                tokens,
                choices=choices,
                speed=speed,
                batch_size=bench.config.evaluation.batch_size,
            )
            for tokens in (bench.texts.search, bench.texts.select)
        )
        return cls(bench, prunable, errors, score, selection, speed)

    def fix_order(self, folder: RunFolder) -> None:
        """Store which ranking the plans of another search mean, or see that it is the stored one.

        Raises:
            ValueError: the search began with another ranking.
        """
        _fix_order(self.prunable, self.errors, self.bench, folder)

    def proposing(self, config: RunConfig) -> Self:
        """Return this arena for another way of proposing plans, or for another budget."""
        return replace(self, bench=self.bench.proposing(config))

    def within(self, budget: Budget, config: RunConfig) -> Self:
        """Return this arena for another budget, with the configuration of its search."""
        return replace(self, bench=replace(self.bench, budget=budget, config=config))

    def slopes(self, plan: Plan, sequences: Sequence[int]) -> Slopes:
        """Return what every level would add to the fitness of a plan on search sequences."""
        if self.bench.scratch is None:
            return self.score.slopes(plan, self.bench.grid, sequences)
        with TemporaryDirectory(dir=self.bench.scratch) as folder:
            return self.score.slopes(plan, self.bench.grid, sequences, Spool(Path(folder)))

    def assess(self, plan: Plan) -> dict[str, float]:
        """Return the predicted speedup of a plan and, where there are items, its accuracy."""
        facts = {"speedup": self.speed.speedup(plan)}
        if not self.bench.config.data.choices:
            return facts
        return facts | {"accuracy": self.score.accuracy(plan)}


def _fix_order(
    prunable: Prunable, errors: Sensitivity, bench: Workbench, folder: RunFolder
) -> None:
    """Store which ranking the plans of this run mean, or see that it is the stored one.

    The cut errors are stored beside it: with them and the ledger a search can be replayed.

    Raises:
        ValueError: the ranking differs from the one that the run began with.
    """
    found = order_hash(prunable.orders(Plan.dense(bench.architecture)))
    if not folder.order.exists():
        folder.statistics.mkdir(exist_ok=True)
        # The order last: where it stands, the errors do too.
        folder.write_json(f"{folder.statistics.name}/errors.json", errors)
        folder.write_json(f"{folder.statistics.name}/{folder.order.name}", {"order_hash": found})
        return
    stored = folder.read_json(f"{folder.statistics.name}/{folder.order.name}")
    began = stored.get("order_hash") if isinstance(stored, dict) else None
    if began != found:
        raise ValueError(
            f"{folder}: the ranking came out as {found}, the run began with {began}; it needs the "
            f"hardware, threads, versions and settings of {folder / 'environment.json'} and "
            "config.yaml beside it, or begin anew without this folder"
        )


def _table(bench: Workbench, folder: RunFolder, progress: Progress) -> LatencyTable:
    """Return the timing that the run began with, so that a resumed one tells the LLM the same."""
    stored = stored_table(folder)
    if stored is not None:
        return stored
    table = bench.table or known_table(
        bench.model, bench.grid, bench.config.workload, Detail.coarse(), progress
    )
    store_table(table, folder)
    return table


def _choices(bench: Workbench) -> EncodedChoices | None:
    data = bench.config.data
    if not data.choices:
        return None
    rows = load_choice_items(data.choices, bench.config.seed, data.root)
    items = [ChoiceItem(x["context"], tuple(x["choices"]), x["gold"]) for x in rows]
    return encode_choices(bench.tokenizer, items)
