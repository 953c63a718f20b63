"""The look of every chart, and the way from a matplotlib figure to an SVG inside a page.

Colours leave as CSS variables (with the light value as fall-back), so that one SVG serves the
light and the dark scheme. Each chart is drawn twice, for a desk and for a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDE, NARROW = 10.4, 3.9  # inches; the page shows them at about 1040 and 350 px

# Series follow Okabe and Ito, whose colours stay apart under the common colour-vision defects.
COLOURS = {
    "ink": "#1c2733",
    "soft": "#5c6878",
    "rule": "#dfe4ea",
    "ghost": "#e6ebf1",
    "card": "#fffffe",
    "dense": "#98a4b3",
    "pruned": "#0072b2",
    "llm": "#0072b3",
    "llm_repaired": "#56b4e9",
    "fallback": "#d55e00",
    "classical": "#009e73",
    "heuristic": "#cc79a7",
    "control": "#e69f00",
}
_VARIABLES = {value: name.replace("_", "-") for name, value in COLOURS.items()}

_LOOK: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfpruner",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.labelsize": 9,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.3,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """One chart as inline SVG, for a wide and for a narrow page; `label` says what it shows."""

    label: str
    wide: Markup
    narrow: Markup


def draw(
    name: str, label: str, paint: Callable[[Any, bool], None], wide: float, narrow: float
) -> Chart:
    """Return the chart that `paint(figure, is_narrow)` draws.

    Args:
        name: prefix of all ids, unique on the page.
        label: what a screen reader says.
        paint: draws on an empty matplotlib figure.
        wide: height in inches for a desk.
        narrow: height in inches for a phone.
    """
    return Chart(
        label,
        _svg(f"{name}-wide", label, lambda figure: paint(figure, False), (WIDE, wide)),
        _svg(f"{name}-narrow", label, lambda figure: paint(figure, True), (NARROW, narrow)),
    )


def patches(names: Sequence[tuple[str, str]]) -> list[Any]:
    """Return legend entries from (name, colour) pairs."""
    from matplotlib.patches import Patch

    return [Patch(facecolor=colour, label=name) for name, colour in names]


def bare_rows(axes: Any) -> None:
    """Leave of the frame only the upright grid lines: for axes whose rows have names."""
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.grid(axis="x")


def whole_ticks(axis: Any, most: int) -> None:
    """Put at most about `most` ticks on whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 3, 4, 5, 6, 8, 10]))


def scale(axis: Any, set_scale: Any, values: Sequence[float]) -> bool:
    """Choose a logarithmic axis for what spans more than a factor of five; say whether it did."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if min(values) <= 0 or max(values) / min(values) <= 5:
        return False
    set_scale("log")
    decades = max(values) / min(values) > 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def _svg(
    name: str, label: str, paint: Callable[[Any], None], inches: tuple[float, float]
) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_embed(buffer.getvalue(), name, label))


def _embed(svg: str, name: str, label: str) -> str:
    """Return the SVG without what belongs to a file, its ids under `name`, its colours variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _variable, svg)
    # Quoted family names inside the attribute go: the page's own font serves.
    svg = re.sub(r"font: ([0-9. ]*?[0-9.]+px)[^;\"]*", r"font: \1 var(--font, sans-serif)", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg {box.group()} role="img" aria-label="{Markup.escape(label)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def _variable(match: re.Match[str]) -> str:
    name = _VARIABLES.get(match[2])
    return f"{match[1]}: var(--{name}, {match[2]})" if name else match[0]
