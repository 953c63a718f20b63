"""What the rows of an experiment say: means, paired differences, and whether the LLM helps.

A unit is a model, a budget and a seed; arms are compared on the units that both have finished.
Fitness is lower is better, so that a negative difference is a gain.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluators.significance import holm, sign_flip, stratified_interval
from selfpruner.cells import Figures, Row
from selfpruner.experiment_config import Role

Axis = Literal["evaluations", "tokens"]
Unit = tuple[str, str, int]
Interval = tuple[float, float] | None

ALPHA = 0.05
LEAST_UNITS = 10
LEAST_SEEDS = 3  # budgets and models of one seed share its draws and windows


@dataclass(frozen=True)
class Comparison:
    """One arm minus another over their common units, at equal evaluations.

    Attributes:
        arm: whose fitness counts with a plus.
        against: whose counts with a minus.
        units: common units.
        seeds: how many seeds they have.
        mean: of the differences; below 0 the arm is better.
        interval: its 95 % t interval over seeds, models and budgets being as they are; None where
            none of them has two.
        p: of the two-sided sign-flip test.
        p_holm: the same, adjusted for the family of tests it belongs to.
    """

    arm: str
    against: str
    units: int
    seeds: int
    mean: float
    interval: Interval
    p: float
    p_holm: float

    @property
    def is_gain(self) -> bool:
        """Whether the arm is better, by more than chance and over enough units and seeds."""
        return self.mean < 0 and self.p_holm < ALPHA and self.is_enough

    @property
    def is_enough(self) -> bool:
        """Whether there are units and seeds enough for a claim."""
        return self.units >= LEAST_UNITS and self.seeds >= LEAST_SEEDS


@dataclass(frozen=True)
class Verdict:
    """Whether the LLM helps, and why, one sentence an arm; no reason where none asks an LLM."""

    helps: bool
    reasons: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        if not self.reasons:
            return "No arm asks an LLM."
        return "The LLM helps." if self.helps else "It is not shown that the LLM helps."


@dataclass(frozen=True)
class Study:
    """The rows of an experiment with what is known of its arms.

    Attributes:
        name: of the experiment.
        rows: finished cells.
        roles: role of each arm.
        placebos: placebos of each arm of role llm.
        named_control: the arm that the file names for comparisons, or None.
        cells: how many cells the experiment has.
    """

    name: str
    rows: Sequence[Row]
    roles: Mapping[str, Role]
    placebos: Mapping[str, tuple[str, ...]]
    named_control: str | None
    cells: int

    @property
    def limit(self) -> float:
        """Full evaluations that every search has: where all runs are read off.

        A run of one plan is no search, whatever its probes cost; its plan stands for it wherever
        others are read off.
        """
        found = [x["figures"] for x in self.rows]
        searches = [x for x in found if x.get("plans", x["evaluations"]) > 1]
        return min((float(x["evaluations"]) for x in searches), default=1.0)

    @property
    def token_limit(self) -> int | None:
        """Tokens that every run of an LLM has; None where there is no such run."""
        return min((x["figures"]["llm_tokens"] for x in self.asking), default=None)

    @property
    def asking(self) -> list[Row]:
        """Rows of runs in which an LLM took part."""
        return [x for x in self.rows if x["figures"]["llm_tokens"]]

    @property
    def arms(self) -> list[str]:
        """Arms with finished cells, the best mean first.

        Means are over the units that all arms have finished, where there are any: units differ in
        how hard they are, and an arm that waits for the hardest would lead.
        """
        return self._by_mean({x["cell"]["arm"] for x in self.rows})

    @property
    def machines(self) -> dict[str, int]:
        """How many cells ran on which CPU or GPU, as far as it is on file."""
        known = (x["figures"].get("machine") for x in self.rows)
        return dict(Counter(x for x in known if x is not None))

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Models and budgets with finished cells, as (model, budget)."""
        return list(dict.fromkeys((x["cell"]["model"], x["cell"]["budget"]) for x in self.rows))

    @property
    def best_control(self) -> str | None:
        """The classical arm with the best mean, over units that all of them have finished.

        None where none has finished a cell.
        """
        return next(iter(self._by_mean({*self.arms} & {*self.classical})), None)

    @property
    def classical(self) -> list[str]:
        """Arms that ask no LLM, finished or not."""
        return [arm for arm, role in self.roles.items() if role == "classical"]

    @property
    def control(self) -> str | None:
        """The arm that others are compared with: the named one, or the best classical one."""
        return self.named_control if self.named_control in self.arms else self.best_control

    def _by_mean(self, arms: Iterable[str]) -> list[str]:
        """Return arms with finished cells, the best mean over their common units first."""
        values = {arm: self.values(arm) for arm in arms}
        shared = set.intersection(*map(set, values.values())) if values else set()
        means = {
            arm: statistics.fmean(x for unit, x in own.items() if unit in shared or not shared)
            for arm, own in values.items()
        }
        return sorted(means, key=lambda arm: (means[arm], arm))

    def figures(self, arm: str) -> dict[Unit, Figures]:
        """Return the figures of an arm by unit."""
        return {unit_of(x): x["figures"] for x in self.rows if x["cell"]["arm"] == arm}

    def values(self, arm: str, name: str = "selection_fitness") -> dict[Unit, float]:
        """Return by unit the fitness of the best plan that the arm had at the limit."""
        return {
            unit: read_off(figures, "evaluations", self.limit)[name]
            for unit, figures in self.figures(arm).items()
        }

    def comparisons(self, control: str) -> list[Comparison]:
        """Return every other arm against `control`, adjusted as one family."""
        return self._family((arm, control) for arm in self.arms if arm != control)

    def sooner(self, arm: str, control: str) -> float | None:
        """Return how many times fewer evaluations `arm` needs for what `control` ends with.

        What the control spent is counted up to the limit; below 1 the arm needs more. Both are
        means over their common units, the control's at the limit. The arm is there from where its
        mean stays as low: means on other tokens rise again where a plan had been lucky. None where
        the arm does not end with as much.
        """
        ends, figures, theirs = self.values(control), self.figures(arm), self.figures(control)
        units = [unit for unit in figures if unit in ends]
        if not units:
            return None
        wanted = statistics.fmean(ends[unit] for unit in units)
        moments: set[float] = {x["evaluations"] for u in units for x in figures[u]["steps"]}
        first = None
        for moment in sorted((x for x in moments if x <= self.limit), reverse=True):
            found = (read_off(figures[unit], "evaluations", moment) for unit in units)
            if statistics.fmean(x["selection_fitness"] for x in found) > wanted:
                break
            first = moment
        spent = statistics.fmean(min(theirs[x]["evaluations"], self.limit) for x in units)
        return None if first is None else spent / max(first, 1.0)

    def verdict(self) -> Verdict:
        """Return whether the LLM helps.

        It does where an arm of role llm beats the best classical arm (its paired difference is
        below 0, Holm-adjusted p below ALPHA over at least LEAST_UNITS units of LEAST_SEEDS seeds)
        and its placebos show that what the LLM is told is the cause: none of them beats that
        control as well, and the arm beats each of them. Without a placebo, or before all of them
        and all classical arms are finished, nothing is claimed.
        """
        if "llm" not in self.roles.values():
            return Verdict(False, ())
        asking = [arm for arm in self.arms if self.roles[arm] == "llm"]
        control = self.best_control
        if not asking or control is None:
            missing = "an arm of role llm" if not asking else "a classical control"
            return Verdict(False, (f"No cell of {missing} is finished.",))
        against = {x.arm: x for x in self.comparisons(control)}
        pairs = [(arm, p) for arm in asking for p in self.placebos.get(arm, ()) if p in against]
        removed = {(x.arm, x.against): x for x in self._family(pairs)}
        findings = [self._finding(against, removed, arm) for arm in asking]
        return Verdict(any(x for x, _ in findings), tuple(text for _, text in findings))

    def _finding(
        self,
        against: Mapping[str, Comparison],
        removed: Mapping[tuple[str, str], Comparison],
        arm: str,
    ) -> tuple[bool, str]:
        """Return whether one arm passes every test, and the first reason where it does not."""
        if arm not in against:
            return False, f"{arm}: no unit is finished by it and by the control."
        found = against[arm]
        if not found.is_gain:
            return False, f"{arm}: {_doubt(found)}"
        if lack := self._lack(arm):
            return False, f"{arm}: {_gain(found)}, but {lack}."
        placebos = self.placebos[arm]
        for name in placebos:
            if against[name].is_gain:
                return False, f"{arm}: its placebo {name} keeps the gain: {_gain(against[name])}."
            if not removed[arm, name].is_gain:
                return False, f"{arm}: it does not beat its placebo: {_doubt(removed[arm, name])}"
        removes = "removes" if len(placebos) == 1 else "remove"
        return True, f"{arm}: {_gain(found)}; {' and '.join(placebos)} {removes} the gain."

    def _lack(self, arm: str) -> str | None:
        """Return what is not finished yet of the rivals and the placebos of an arm."""
        units, placebos = self.values(arm).keys(), self.placebos.get(arm, ())
        waiting = [x for x in self.classical if not units <= self.values(x).keys()]
        if waiting:
            return f"{waiting[0]} is not finished, so that the best classical arm is not known"
        missing = [name for name in placebos if not units <= self.values(name).keys()]
        if placebos and not missing:
            return None
        some = len(missing) < len(placebos)
        one = f"its placebo {missing[0]} is not" if some else "no placebo of it is"
        return f"{one} finished, so that the cause may be the search around the LLM"

    def _family(self, pairs: Iterable[tuple[str, str]]) -> list[Comparison]:
        """Return comparisons of (arm, other) where they have common units, adjusted together."""
        differences = {pair: self._differences(*pair) for pair in pairs}
        differences = {pair: values for pair, values in differences.items() if values}
        names = {" / ".join(pair): pair for pair in differences}
        p_values = {name: sign_flip([*differences[pair].values()]) for name, pair in names.items()}
        adjusted = holm(p_values)
        return [
            Comparison(
                arm=pair[0],
                against=pair[1],
                units=len(differences[pair]),
                seeds=len({seed for _, _, seed in differences[pair]}),
                mean=statistics.fmean(differences[pair].values()),
                interval=interval_of(differences[pair]),
                p=p_values[name],
                p_holm=adjusted[name],
            )
            for name, pair in names.items()
        ]

    def _differences(self, arm: str, other: str) -> dict[Unit, float]:
        one, two = self.values(arm), self.values(other)
        found = {unit: one[unit] - two[unit] for unit in one if unit in two}
        if not (self._is_fixed(arm) and self._is_fixed(other)):
            return found
        # Two plans that no seed changes differ once, however many seeds they are filed under.
        return {unit: found[unit] for unit in {unit[:2]: unit for unit in found}.values()}

    def _is_fixed(self, arm: str) -> bool:
        """Whether every run of the arm scored one plan."""
        return all(x.get("plans") == 1 for x in self.figures(arm).values())


def unit_of(row: Row) -> Unit:
    """Return the unit that a row belongs to."""
    cell = row["cell"]
    return cell["model"], cell["budget"], cell["seed"]


def interval_of(values: Mapping[Unit, float]) -> Interval:
    """Return the 95 % interval of the mean over seeds, models and budgets being as they are."""
    strata: dict[tuple[str, str], list[float]] = {}
    for (model, budget, _), value in values.items():
        strata.setdefault((model, budget), []).append(value)
    return stratified_interval([*strata.values()])


def read_off(figures: Figures, axis: Axis, limit: float) -> dict[str, Any]:
    """Return the last improvement within the limit; the first plan where there is none."""
    steps: list[dict[str, Any]] = figures["steps"]
    within = [x for x in steps if x[axis] <= limit]
    return within[-1] if within else steps[0]


def _gain(found: Comparison) -> str:
    return (
        f"beats {found.against} by {-found.mean:.4f} over {_units(found)} "
        f"(adjusted p = {found.p_holm:.3g})"
    )


def _doubt(found: Comparison) -> str:
    """Return why a comparison is no gain."""
    change = f"{abs(found.mean):.4f} {'lower' if found.mean < 0 else 'higher'}"
    if found.mean >= 0:
        return (
            f"no gain over {found.against}: its fitness is {change} over {_units(found)} "
            f"(adjusted p = {found.p_holm:.3g})."
        )
    if not found.is_enough:
        few = "units" if found.units < LEAST_UNITS else "seeds"
        return (
            f"too few {few}: its fitness is {change} than that of {found.against} over "
            f"{_units(found)} of {found.seeds} seeds, where at least {LEAST_UNITS} of "
            f"{LEAST_SEEDS} are wanted."
        )
    return (
        f"no gain over {found.against} that chance does not explain: its fitness is {change} over "
        f"{_units(found)} (adjusted p = {found.p_holm:.3g}, wanted below {ALPHA})."
    )


def _units(found: Comparison) -> str:
    return f"{found.units} paired {'unit' if found.units == 1 else 'units'}"
