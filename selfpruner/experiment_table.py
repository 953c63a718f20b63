"""What an experiment says: tables at equal evaluations and at equal tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from selfpruner.cells import Row

Unit = Literal["evaluations", "tokens"]

_TOTALS = ("llm_calls", "llm_tokens", "fallbacks", "duplicates", "seconds")


def tables(rows: Sequence[Row]) -> str:
    """Return Markdown: one table at equal evaluations and, where an LLM took part, at equal tokens.

    Equal means what the most frugal run spent in all; every run is read off at that point of its
    course. Figures are means over seeds, with the standard deviation where there are several.
    """
    parts = [_table(rows, "evaluations", min(x["figures"]["evaluations"] for x in rows))]
    asking = [x for x in rows if x["figures"]["llm_tokens"]]
    if asking:
        limit = min(x["figures"]["llm_tokens"] for x in asking)
        parts.append(_table(asking, "tokens", limit))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], unit: Unit, limit: float) -> str:
    arms = list(dict.fromkeys(x["cell"]["arm"] for x in rows))
    groups = {arm: [x["figures"] for x in rows if x["cell"]["arm"] == arm] for arm in arms}
    order = sorted(arms, key=lambda arm: statistics.fmean(_values(groups[arm], unit, limit)))
    # Read off before its end, a run's totals would mislead.
    totals = _TOTALS if unit == "evaluations" else ()
    columns = ["arm", "runs", "fitness, fresh tokens", "fitness, search tokens"]
    columns += [name.replace("_", " ") for name in totals]
    lines = [columns, ["---"] * len(columns)]
    lines += [_line(arm, groups[arm], unit, limit, totals) for arm in order]
    head = f"At {limit:.7g} {unit} of every run, best first:\n"
    return "\n".join([head, *(f"| {' | '.join(x)} |" for x in lines)])


def _line(
    arm: str, runs: list[dict[str, Any]], unit: Unit, limit: float, totals: Sequence[str]
) -> list[str]:
    return [
        arm,
        str(len(runs)),
        _spread(_values(runs, unit, limit)),
        _spread(_values(runs, unit, limit, "fitness")),
        *(f"{statistics.fmean(x[name] for x in runs):.0f}" for name in totals),
    ]


def _values(
    runs: list[dict[str, Any]], unit: Unit, limit: float, name: str = "selection_fitness"
) -> list[float]:
    """Return the figure of every run's best plan at `limit`."""
    return [_step(x["steps"], unit, limit)[name] for x in runs]


def _step(steps: list[dict[str, Any]], unit: Unit, limit: float) -> dict[str, Any]:
    """Return the last improvement within the limit; the first plan where there is none."""
    within = [x for x in steps if x[unit] <= limit]
    return within[-1] if within else steps[0]


def _spread(values: list[float]) -> str:
    """Return the mean, with the standard deviation where there is one."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
