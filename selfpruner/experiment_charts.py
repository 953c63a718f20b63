"""The charts of an experiment: the course of every arm, and its distance from the control."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from evaluators.significance import mean_interval
from selfpruner.canvas import COLOURS, Chart, bare_rows, draw, whole_ticks
from selfpruner.cells import Figures
from selfpruner.experiment_study import Axis, Comparison, Study, read_off
from selfpruner.notation import clip

ROLE_COLOURS = {
    "classical": COLOURS["classical"],
    "llm": COLOURS["pruned"],
    "placebo": COLOURS["control"],
}
_TOTALS = {"evaluations": "evaluations", "tokens": "llm_tokens"}
_LABELS = {"evaluations": "full evaluations", "tokens": "thousands of tokens of the LLM"}
_UNIT = {"evaluations": 1.0, "tokens": 1000.0}

Course = list[tuple[float, float, float, float]]


def course(runs: Sequence[Figures], axis: Axis) -> Course:
    """Return (spent, mean, low, high) where the mean of the best plan so far changes.

    Fitness is on fresh tokens, of the plan that was best on search tokens; low and high are the
    95 % t interval, the mean itself for one run. It begins where all runs have a plan and ends
    with the first run that ends.
    """
    start = max(run["steps"][0][axis] for run in runs)
    end = min(run[_TOTALS[axis]] for run in runs)
    stops = {start, end} | {x[axis] for run in runs for x in run["steps"]}
    points: Course = []
    for spent in sorted(x for x in stops if start <= x <= max(start, end)):
        values = [read_off(run, axis, spent)["selection_fitness"] for run in runs]
        mean = statistics.fmean(values)
        low, high = mean_interval(values) or (mean, mean)
        points.append((float(spent), mean, low, high))
    return points


def course_chart(study: Study, model: str, budget: str, axis: Axis) -> Chart | None:
    """Return the anytime curves of all arms, a panel each; None where none spends on the axis."""
    control = study.control
    runs = {
        arm: [x for unit, x in study.figures(arm).items() if unit[:2] == (model, budget)]
        for arm in study.arms
    }
    courses = {
        arm: course(found, axis)
        for arm, found in runs.items()
        if found and all(x[_TOTALS[axis]] for x in found)
    }
    if not courses:
        return None
    ghost = course(runs[control], "evaluations") if control and runs[control] else []
    if axis == "tokens" and ghost:
        # The control asks no LLM: what it came to in all is a level here, not a course.
        last = max(x[-1][0] for x in courses.values())
        ghost = [(spent, *ghost[-1][1:]) for spent in (0.0, last)]
    # One plan has no course: it is a level over the panel.
    last = max(x[-1][0] for x in courses.values())
    courses = {arm: _level(x, last) for arm, x in courses.items()}
    ghost = _level(ghost, last)
    label = f"Fitness on fresh tokens of the best plan so far, by {_LABELS[axis]}, for every arm"
    wide, narrow = (math.ceil(len(courses) / columns) for columns in (4, 2))
    name = f"course-{axis}-{study.settings.index((model, budget))}"
    paint = partial(_paint_courses, study, courses, ghost, axis)
    return draw(name, label, paint, 0.7 + 1.75 * wide, 0.7 + 1.55 * narrow)


def _level(points: Course, last: float) -> Course:
    """Return a course of one point as a level up to `last`; others as they are."""
    return [*points, (last, *points[0][1:])] if len(points) == 1 else points


def _paint_courses(
    study: Study,
    courses: dict[str, Course],
    ghost: Course,
    axis: Axis,
    figure: Any,
    narrow: bool,
) -> None:
    columns = 2 if narrow else 4
    rows = math.ceil(len(courses) / columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (arm, points) in zip(panels, courses.items(), strict=False):
        if arm != study.control:
            _draw(axes, ghost, axis, COLOURS["dense"], filled=False)
        _draw(axes, points, axis, ROLE_COLOURS[study.roles[arm]], filled=True)
        axes.set_title(
            clip(arm, 18 if narrow else 30), loc="left", fontsize=9, color=COLOURS["ink"]
        )
        axes.tick_params(length=0, labelbottom=True)
        axes.grid(axis="y")
        whole_ticks(axes.xaxis, 3 if narrow else 5)
    for axes in panels[len(courses) :]:
        axes.set_visible(False)
    # Few runs have wide intervals: the means decide what is shown, bands may run out of it.
    means = [mean for points in (*courses.values(), ghost) for _, mean, _, _ in points]
    room = 0.35 * (max(means) - min(means)) or 0.05 * abs(max(means)) or 1.0
    panels[0].set_ylim(min(means) - room, max(means) + room)
    figure.supxlabel(_LABELS[axis], fontsize=9, color=COLOURS["soft"])
    figure.supylabel(
        "fitness (lower is better)" if narrow else "fitness on fresh tokens (lower is better)",
        fontsize=9,
        color=COLOURS["soft"],
    )


def _draw(axes: Any, points: Course, axis: Axis, colour: str, *, filled: bool) -> None:
    spent = [x / _UNIT[axis] for x, *_ in points]
    lows, highs = [x[2] for x in points], [x[3] for x in points]
    if filled and lows != highs:
        axes.fill_between(spent, lows, highs, step="post", color=colour, alpha=0.16, linewidth=0)
    width = 1.8 if filled else 1.1
    axes.step(spent, [x[1] for x in points], where="post", color=colour, linewidth=width)


def difference_chart(study: Study, comparisons: Sequence[Comparison]) -> Chart | None:
    """Return every arm's paired difference to the control with its interval; None for none."""
    if not comparisons:
        return None
    label = "Fitness of every arm minus that of the control, paired, with 95 % intervals"
    height = 0.9 + 0.34 * len(comparisons)
    return draw(
        "difference", label, partial(_paint_differences, study, comparisons), height, height
    )


def _paint_differences(
    study: Study, comparisons: Sequence[Comparison], figure: Any, narrow: bool
) -> None:
    axes = figure.subplots()
    for row, found in enumerate(comparisons):
        colour = ROLE_COLOURS[study.roles[found.arm]]
        if found.interval is not None:
            axes.plot(found.interval, [row, row], color=colour, linewidth=2, alpha=1)
        axes.scatter([found.mean], [row], s=44, color=colour, zorder=3)
    axes.axvline(0, color=COLOURS["soft"], linewidth=1)
    names = [clip(x.arm, 16 if narrow else 30) for x in comparisons]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    bare_rows(axes)
    against = comparisons[0].against
    side = "" if narrow else "; left of zero the arm is better"
    axes.set_xlabel(clip(f"fitness minus that of {against}{side}", 44 if narrow else 90))
