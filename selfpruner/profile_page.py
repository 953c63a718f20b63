"""The page of a profile: one self-contained HTML file that looks like the report of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from selfpruner.canvas import COLOURS, Chart, draw
from selfpruner.profile import Profile
from selfpruner.report import page_environment, write_page


def write_profile_page(profile: Profile, out: Path) -> Path:
    """Write the page of `profile` and return its path."""
    text = page_environment().get_template("profile.html.j2").render(
        profile=profile, calibration=calibration_chart(profile), curves=curves_chart(profile)
    )  # fmt: skip
    return write_page(out, text)


def calibration_chart(profile: Profile) -> Chart:
    """Return measured over predicted times of the unseen plans, with the line of equal times."""
    label = "Measured against predicted milliseconds of unseen plans"
    return draw("calibration", label, partial(_paint_calibration, profile), 3.9, 3.6)


def _paint_calibration(profile: Profile, figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    rows = (profile.dense, *profile.rows)
    ends = [f(x for row in rows for x in (row.predicted, row.measured)) for f in (min, max)]
    axes.plot(ends, ends, color=COLOURS["ink"], linewidth=1.0, zorder=1, label="as predicted")
    band = [profile.repeatability * x for x in ends]
    axes.fill_between(
        ends,
        [x - y for x, y in zip(ends, band, strict=True)],
        [x + y for x, y in zip(ends, band, strict=True)],
        color=COLOURS["ghost"],
        zorder=0,
        label="repeatability",
    )
    for chosen, name, colour, marker in (
        (rows[:1], "dense", COLOURS["dense"], "D"),
        (rows[1:], "unseen plans", COLOURS["pruned"], "o"),
    ):
        axes.scatter(
            [x.predicted for x in chosen],
            [x.measured for x in chosen],
            s=26 if narrow else 44,
            color=colour,
            marker=marker,
            edgecolor=COLOURS["card"],
            linewidth=0.5,
            zorder=2,
            label=name,
        )
    axes.set(xlabel="predicted milliseconds", ylabel="measured milliseconds")
    axes.grid()
    axes.tick_params(length=0)
    axes.legend(
        ncols=2 if narrow else 4, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2
    )


def curves_chart(profile: Profile) -> Chart:
    """Return the calibrated milliseconds of one block by what it keeps."""
    label = "Milliseconds of one attention block and of one MLP by what they keep"
    return draw("curves", label, partial(_paint_curves, profile), 3.2, 4.6)


def _paint_curves(profile: Profile, figure: Any, narrow: bool) -> None:
    table = profile.table
    unit = "KV groups" if table.unit == "kv_group" else "query heads a group"
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axes, curve, name in (
        (panels[0], table.attention, f"{unit} kept in one attention block"),
        (panels[1], table.mlp, "channels kept in one MLP"),
    ):
        kept, times = zip(*curve, strict=True)
        axes.plot(kept, [table.slope * x for x in times], marker="o", color=COLOURS["pruned"])
        axes.set(xlabel=name, ylabel="milliseconds", xlim=(0, None), ylim=(0, None))
        axes.grid()
        axes.tick_params(length=0)
