"""The charts of the report: what each one shows. `canvas` holds how they look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from selfpruner.canvas import COLOURS, Chart, bare_rows, draw, patches, scale, whole_ticks
from selfpruner.notation import clip, number, times
from selfpruner.results import FrontPoint, HistoryRow, QualityNumbers, Results, SpeedRow

ORIGINS = {
    "llm": ("LLM", "o"),
    "llm_repaired": ("LLM, repaired", "D"),
    "fallback": ("fallback", "X"),
    "classical": ("classical", "s"),
    "heuristic": ("heuristic", "^"),
}
_LEGEND_ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0.0, 1.0),
    "borderaxespad": 0.2,
}


def units_chart(results: Results) -> Chart:
    """Return kept units per layer: query heads by KV group above, MLP channels below."""
    label = "Query heads and MLP channels kept in every layer, next to the dense model"
    return draw("units", label, partial(_paint_units, results), 4.3, 4.4)


def _paint_units(results: Results, figure: Any, narrow: bool) -> None:
    attention, mlp = figure.subplots(2, 1, sharex=True)
    layers = [x.layer for x in results.units]
    dense = results.units_dense
    heads = dense.kv_groups * dense.q_per_group
    attention.bar(layers, [heads] * len(layers), 0.82, color=COLOURS["ghost"])
    for group in range(dense.kv_groups):
        kept = [x.q_per_group if group < x.kv_groups else 0 for x in results.units]
        floor = group * dense.q_per_group
        attention.bar(layers, kept, 0.82, bottom=floor, color=COLOURS["pruned"])
    for line in range(1, heads) if heads <= 40 else ():
        between_groups = line % dense.q_per_group == 0
        attention.axhline(line, color=COLOURS["card"], linewidth=2.4 if between_groups else 0.7)
    mlp.bar(layers, [dense.mlp_channels] * len(layers), 0.82, color=COLOURS["ghost"])
    mlp.bar(layers, [x.mlp_channels for x in results.units], 0.82, color=COLOURS["pruned"])
    attention.set_ylabel("query heads")
    mlp.set(ylabel="MLP channels", xlabel="layer", xlim=(-0.7, len(layers) - 0.3))
    whole_ticks(attention.yaxis, 4)
    whole_ticks(mlp.yaxis, 4)
    whole_ticks(mlp.xaxis, 6 if narrow else 16)
    for axes in (attention, mlp):
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    names = [("kept", COLOURS["pruned"]), ("removed", COLOURS["ghost"])]
    attention.legend(handles=patches(names), ncols=2, **_LEGEND_ABOVE)


def fitness_chart(history: Sequence[HistoryRow]) -> Chart | None:
    """Return fitness over evaluations by origin; None where nothing was scored."""
    rows = [x for x in history if x.fitness is not None]
    if not rows:
        return None
    label = "Fitness of every scored candidate by origin, with the best so far"
    return draw("fitness", label, partial(_paint_fitness, rows), 3.9, 3.6)


def _paint_fitness(rows: Sequence[HistoryRow], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    values = [x.fitness for x in rows if x.fitness is not None]
    # One ruined candidate must not flatten all others: what lies above is drawn at the top edge.
    top = max(10 * median(values), rows[0].best or 0.0) if min(values) > 0 else max(values)
    for origin, (name, marker) in ORIGINS.items():
        mine = [
            (x.evaluation, x.fitness) for x in rows if x.origin == origin and x.fitness is not None
        ]
        if mine:
            axes.scatter(
                [x for x, _ in mine],
                [min(y, top) for _, y in mine],
                s=20 if narrow else 34,
                marker=marker,
                color=COLOURS[origin],
                edgecolor=COLOURS["card"],
                linewidth=0.5,
                label=name,
                zorder=3,
            )
    best = [x.best for x in rows]
    steps = {"where": "post", "color": COLOURS["ink"], "linewidth": 1.5, "zorder": 2}
    axes.step([x.evaluation for x in rows], best, label="best so far", **steps)
    for before, after in pairwise(rows):
        if after.generation != before.generation:
            middle = after.evaluation - 0.5
            axes.axvline(middle, color=COLOURS["rule"], linewidth=0.8, zorder=0)
    scale(axes.yaxis, axes.set_yscale, [min(x, top) for x in values])
    axes.set_ylabel("fitness (lower is better)")
    cut = sum(x > top for x in values)
    note = f"; {cut} above {top:.3g} at the top edge" if cut else ""
    lines = "" if narrow else " (upright lines part generations)"
    axes.set_xlabel(f"plans scored{lines}{note}")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    whole_ticks(axes.xaxis, 5 if narrow else 10)
    axes.legend(ncols=3 if narrow else 6, **_LEGEND_ABOVE)


def front_chart(points: Sequence[FrontPoint]) -> Chart | None:
    """Return fitness over predicted time, the dense model first; None where there was one only."""
    rows = [x for x in points if x.fitness is not None and x.selection_fitness is not None]
    if len(rows) < 2:
        return None
    label = "Fitness of the best plan within each budget, on search tokens and on fresh ones"
    return draw("front", label, partial(_paint_front, rows), 3.4, 3.4)


def _paint_front(rows: Sequence[FrontPoint], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    times_ms = [x.milliseconds for x in rows if x.milliseconds is not None]
    timed = len(times_ms) == len(rows)
    across = times_ms if timed else [100 * x.achieved for x in rows]
    for values, name, colour, marker in (
        ([x.fitness for x in rows], "search tokens", COLOURS["dense"], "D"),
        ([x.selection_fitness for x in rows], "fresh tokens", COLOURS["pruned"], "o"),
    ):
        axes.plot(across, values, marker=marker, markersize=6, color=colour, label=name)
    if not narrow:
        for x, row in zip(across, rows, strict=True):
            note = "dense" if row.evaluations == 0 else times(row.speedup)
            height = max(y for y in (row.fitness, row.selection_fitness) if y is not None)
            # Both lines rise to the right.
            axes.annotate(note, (x, height), (-5, 5), textcoords="offset points", ha="right")
        axes.margins(x=0.08)
    axes.invert_xaxis()
    name = "predicted milliseconds" if timed else "kept (% of the blocks)"
    axes.set_xlabel(name + ("" if narrow else ", with predicted speedup"))
    axes.set_ylabel("fitness (lower is better)")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.legend(ncols=2, **_LEGEND_ABOVE)


def accuracy_chart(
    dense: QualityNumbers, pruned: QualityNumbers, figures: Mapping[str, tuple[float, float]]
) -> Chart | None:
    """Return accuracy per task with one standard error each way; None without tasks.

    Args:
        dense: numbers of the dense model.
        pruned: numbers of the pruned model, on the same tasks.
        figures: task -> (dense, pruned) accuracy that enters the mean, 0 to 1.
    """
    if not figures:
        return None
    label = "Accuracy of the dense and the pruned model on every task, with standard errors"
    height = 1.0 + 0.36 * len(figures)
    return draw("accuracy", label, partial(_paint_accuracy, dense, pruned, figures), height, height)


def _paint_accuracy(
    dense: QualityNumbers,
    pruned: QualityNumbers,
    figures: Mapping[str, tuple[float, float]],
    figure: Any,
    narrow: bool,
) -> None:
    axes = figure.subplots()
    for side, model, name, colour, marker, shift in (
        (0, dense, "dense", COLOURS["dense"], "D", -0.14),
        (1, pruned, "pruned", COLOURS["pruned"], "o", 0.14),
    ):
        axes.errorbar(
            [100 * pair[side] for pair in figures.values()],
            [row + shift for row in range(len(figures))],
            xerr=[100 * (model.tasks[task].stderr or 0.0) for task in figures],
            fmt=marker,
            markersize=6,
            color=colour,
            elinewidth=1.6,
            label=name,
        )
    axes.set_yticks(range(len(figures)), [_name(x, narrow) for x in figures])
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.set_xlabel("accuracy (%)" if narrow else "accuracy (%), bars: one standard error each way")
    bare_rows(axes)
    axes.legend(ncols=2, **_LEGEND_ABOVE)


def speed_chart(rows: Sequence[SpeedRow]) -> Chart | None:
    """Return time per phase relative to the dense model; None where speed was not measured."""
    if not rows:
        return None
    label = "Time of each phase relative to the dense model, with speedups"
    height = 0.95 + 0.62 * len(rows)
    return draw("speed", label, partial(_paint_speed, rows), height, height)


def _paint_speed(rows: Sequence[SpeedRow], figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    for position, row in enumerate(rows):
        share = 100 * row.pruned_ms / row.dense_ms
        axes.barh(position - 0.18, 100, 0.32, color=COLOURS["dense"])
        axes.barh(position + 0.18, share, 0.32, color=COLOURS["pruned"])
        axes.text(101.5, position - 0.18, f"{number(row.dense_ms, 1)} ms", va="center")
        pruned = f"{number(row.pruned_ms, 1)} ms" if narrow else (
            f"{number(row.pruned_ms, 1)} ms · {times(row.speedup)}")  # fmt: skip
        axes.text(share + 1.5, position + 0.18, pruned, va="center")
    names = [f"{_name(x.phase, narrow)}\n{x.tokens} prompt tokens, batch {x.batch}" for x in rows]
    if narrow:
        names = [f"{_name(x.phase, narrow)}\n{times(x.speedup)}" for x in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    longest = max(100.0, *(100 * x.pruned_ms / x.dense_ms for x in rows))
    axes.set_xlim(0, longest * (1.35 if narrow else 1.16))
    axes.set_xlabel("time (% of dense)")
    bare_rows(axes)
    names_colours = [("dense", COLOURS["dense"]), ("pruned", COLOURS["pruned"])]
    axes.legend(handles=patches(names_colours), ncols=2, **_LEGEND_ABOVE)


def perplexity_chart(rows: Sequence[tuple[str, str, str, float]]) -> Chart | None:
    """Return perplexity by text and model.

    Args:
        rows: (text, model, kind, perplexity) with kind dense, pruned or control, text by text.
    """
    if not rows:
        return None
    label = "Perplexity of the dense and the pruned model and of the controls"
    height = 0.75 + 0.25 * len(rows) + 0.12 * len({x[0] for x in rows})
    return draw("perplexity", label, partial(_paint_perplexity, rows), height, height)


def _paint_perplexity(
    rows: Sequence[tuple[str, str, str, float]], figure: Any, narrow: bool
) -> None:
    texts = list(dict.fromkeys(row[0] for row in rows))
    panels = figure.subplots(len(texts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, text in zip(panels, texts, strict=True):
        mine = [row for row in rows if row[0] == text]
        for position, (_, _, kind, value) in enumerate(mine):
            colour = COLOURS[kind]
            axes.plot([mine[0][3], value], [position] * 2, color=colour, linewidth=2, alpha=1)
            axes.scatter([value], [position], s=42, color=colour, zorder=3)
            axes.annotate(
                number(value), (value, position), (7, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(mine)), [_name(row[1], narrow) for row in mine])
        axes.set_ylim(len(mine) - 0.5, -0.5)
        axes.set_title(clip(text, 40), loc="left", fontsize=9, color=COLOURS["soft"])
        bare_rows(axes)
    values = [row[3] for row in rows]
    is_log = scale(panels[-1].xaxis, panels[-1].set_xscale, values)
    low, high = min(values), max(values)
    if is_log:
        panels[-1].set_xlim(low / 1.1, high * (high / low) ** (0.3 if narrow else 0.1))
    else:
        panels[-1].set_xlim(0, high * (1.25 if narrow else 1.08))
    panels[-1].set_xlabel("perplexity (lower is better)")


def comparison_chart(
    points: Sequence[tuple[str, float, float, float, float]],
) -> Chart | None:
    """Return mean accuracy over parameters for several runs; None without accuracies.

    Args:
        points: (label, dense parameters, dense mean, pruned parameters, pruned mean) a run.
    """
    if not points:
        return None
    label = "Mean accuracy over parameters, dense and pruned, for every run"
    return draw("comparison", label, partial(_paint_comparison, points), 3.9, 3.4)


def _paint_comparison(
    points: Sequence[tuple[str, float, float, float, float]], figure: Any, narrow: bool
) -> None:
    axes = figure.subplots()
    for index, (name, dense_size, dense_mean, size, mean) in enumerate(points):
        x, y = (dense_size / 1e6, size / 1e6), (100 * dense_mean, 100 * mean)
        first = index == 0
        axes.plot(x, y, color=COLOURS["dense"], linewidth=0.9, zorder=1)
        axes.scatter(x[:1], y[:1], s=42, marker="D", color=COLOURS["dense"], zorder=2,
                     label="dense" if first else None)  # fmt: skip
        axes.scatter(x[1:], y[1:], s=52, color=COLOURS["pruned"], zorder=3,
                     label="pruned" if first else None)  # fmt: skip
        axes.annotate(name, (x[1], y[1]), (7, 5), textcoords="offset points", zorder=4)
    axes.margins(0.1 if narrow else 0.06, 0.16)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("mean accuracy (%)")
    axes.grid()
    axes.tick_params(length=0)
    axes.legend(ncols=2, **_LEGEND_ABOVE)


def _name(text: str, narrow: bool) -> str:
    return clip(text, 14 if narrow else 28)
