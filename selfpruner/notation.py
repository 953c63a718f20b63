"""How numbers are written in the report, the comparison and the model card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

MISSING = "–"  # noqa: RUF001
_DECIMAL = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def whole(value: int | None) -> str:
    """Return an integer with thousands separators."""
    return MISSING if value is None else f"{value:,}"


def counted(count: int, word: str) -> str:
    """Return `1 plan` or `12 plans`."""
    return f"{whole(count)} {word}{'' if count == 1 else 's'}"


def short(value: float) -> str:
    """Return a count in thousands, millions, ...: `134.5 M`."""
    return _scaled(value, _DECIMAL, "")


def size(value: float | None) -> str:
    """Return bytes in decimal units: `269.0 MB`."""
    return MISSING if value is None else _scaled(value, _BYTES, " bytes")


def read_size(value: object) -> object:
    """Return `40GiB` or `500 MB` as bytes; anything but text comes back as it is.

    Raises:
        ValueError: text that is no number with a unit.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9.]+) ?([kKMGT]i?B|B)", value.strip())
    try:
        amount = float(found[1]) if found else math.nan
    except ValueError:
        amount = math.nan
    if found is None or math.isnan(amount):
        raise ValueError(f"got {value!r}; allowed: bytes, or a number with B, kB to TB, KiB to TiB")
    power = "BKMGT".index(found[2][0].upper())
    return amount * (1024 if "i" in found[2] else 1000) ** power


def amount(value: float, kind: str) -> str:
    """Return a budget's target or what was achieved, in the unit of its kind."""
    if kind == "speedup":
        return f"a predicted {times(value)} the speed"
    if kind == "memory":
        return size(value)
    if value <= 1:
        return f"{percent(value, 2)} of the blocks"
    return short(value)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed decimals; a huge one in powers of ten."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share (0 to 1) in percent."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a real minus, and no sign for what rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0.0:
        return text
    return ("−" if value < 0 else "+") + text  # noqa: RUF001


def p_value(value: float | None) -> str:
    """Return a probability with three decimals; a small one as `< 0.001`."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def times(ratio: float | None) -> str:
    """Return a ratio as a factor: `1.31×`."""  # noqa: RUF002
    return MISSING if ratio is None else f"{ratio:.2f}×"  # noqa: RUF001


def duration(seconds: float) -> str:
    """Return seconds as `2.31 s`, `6 min 53 s` or `3 h 05 min`."""
    if round(seconds, 2) < 100:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clip(text: str, most: int) -> str:
    """Return a label of one line and at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _scaled(value: float, steps: tuple[tuple[float, str], ...], plain: str) -> str:
    for factor, name in steps:
        if abs(value) >= 0.99995 * factor:  # 999.96 M would be written as 1000.0 M
            return f"{value / factor:.1f} {name}"
    return f"{value:.0f}{plain}"


FILTERS: dict[str, Callable[..., str]] = {
    "whole": whole,
    "counted": counted,
    "short": short,
    "size": size,
    "amount": amount,
    "number": number,
    "percent": percent,
    "signed": signed,
    "p_value": p_value,
    "times": times,
    "duration": duration,
}
