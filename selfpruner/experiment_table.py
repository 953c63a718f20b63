"""An experiment on the terminal: one Markdown table at equal evaluations, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from agent.racing import NOT_FINITE
from selfpruner.experiment_study import Axis, Comparison, Study, Unit, interval_of, read_off
from selfpruner.notation import MISSING

COLUMNS = (
    "arm",
    "role",
    "runs",
    "fitness, fresh tokens",
    "minus control, paired",
    "p",
    "p, Holm",
    "sooner",
    "fitness, search tokens",
    "llm calls",
    "llm tokens",
    "fallbacks",
    "duplicates",
    "seconds",
)
_TOTALS = ("llm_calls", "llm_tokens", "fallbacks", "duplicates", "seconds")


def table(study: Study) -> str:
    """Return Markdown: the arms at equal evaluations, best first, and whether the LLM helps.

    Equal means what the most frugal run spent in all; every run is read off at that point of its
    course. Figures are means over runs with their 95 % intervals over seeds; `sooner` says how many
    times fewer evaluations an arm needs for what the control ends with.
    """
    verdict = study.verdict()
    compared = "no control" if study.control is None else f"the control is {study.control}"
    if len(study.rows) < study.cells:
        compared += f"; {len(study.rows)} of {study.cells} cells are finished"
    return "\n".join([
        f"At {study.limit:.7g} evaluations of every run, best first; {compared}:",
        "",
        *(f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *lines(study))),
        "",
        verdict.headline,
        *(f"- {reason}" for reason in verdict.reasons),
        *(("", warning) if (warning := different_machines(study)) else ()),
    ])  # fmt: skip


def different_machines(study: Study) -> str | None:
    """Return a warning where cells that are compared ran on different machines."""
    machines = study.machines
    if len(machines) < 2:
        return None
    told = ", ".join(f"{count} on {name}" for name, count in sorted(machines.items()))
    return f"Cells ran on different machines, whose rounding moves figures a little: {told}."


def lines(study: Study) -> list[tuple[str, ...]]:
    """Return a row of texts an arm, in the order of `COLUMNS`."""
    found = study.comparisons(study.control) if study.control is not None else []
    against = {x.arm: x for x in found}
    rows = []
    for arm in study.arms:
        runs = list(study.figures(arm).values())
        rows.append((
            arm,
            study.roles[arm],
            str(len(runs)),
            spread(study.values(arm)),
            *_difference(against.get(arm)),
            _sooner(study, arm),
            spread(study.values(arm, "fitness")),
            *(f"{statistics.fmean(x[name] for x in runs):.0f}" for name in _TOTALS),
        ))  # fmt: skip
    return rows


def token_lines(study: Study) -> list[tuple[str, ...]]:
    """Return (arm, runs, fitness on fresh tokens, on search tokens) at equal tokens of the LLM."""
    axis: Axis = "tokens"
    limit = study.token_limit
    arms = list(dict.fromkeys(x["cell"]["arm"] for x in study.asking))
    rows = []
    for arm in arms if limit is not None else []:
        steps = {unit: read_off(x, axis, limit or 0) for unit, x in study.figures(arm).items()}
        fresh, old = (
            {unit: float(x[name]) for unit, x in steps.items()}
            for name in ("selection_fitness", "fitness")
        )
        row = (arm, str(len(steps)), spread(fresh), spread(old))
        rows.append((statistics.fmean(fresh.values()), row))
    return [row for _, row in sorted(rows)]


def spread(values: Mapping[Unit, float]) -> str:
    """Return the mean and, where there are several seeds, its 95 % interval over them."""
    if broken := sum(abs(x) >= NOT_FINITE for x in values.values()):
        return f"{broken} of {len(values)} not finite"
    mean, interval = f"{statistics.fmean(values.values()):.4f}", interval_of(values)
    return mean if interval is None else f"{mean} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _sooner(study: Study, arm: str) -> str:
    if study.control is None or arm == study.control:
        return MISSING
    times = study.sooner(arm, study.control)
    return MISSING if times is None else f"{times:.2f}x"


def _difference(found: Comparison | None) -> tuple[str, str, str]:
    if found is None:
        return MISSING, MISSING, MISSING
    interval = found.interval
    if abs(found.mean) * found.units >= NOT_FINITE:
        return "not finite", f"{found.p:.3g}", f"{found.p_holm:.3g}"
    limits = "" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return f"{found.mean:+.4f}{limits}", f"{found.p:.3g}", f"{found.p_holm:.3g}"
