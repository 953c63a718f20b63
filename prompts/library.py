"""Prompt strategies: folders of text files with `{name}` placeholders that are checked on load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Form = Literal["vectors", "moves", "mix", "select"]
Reasons = Literal["none", "why", "reflection"]

OPERATORS = ("generate", "select", "crossover", "mutate")
FORMS: dict[str, tuple[Form, ...]] = {
    "generate": ("vectors", "moves"),
    "select": ("select",),
    "crossover": ("vectors", "mix"),
    "mutate": ("vectors", "moves"),
}
FACTS = ("model", "best", "worst", "failed", "latency", "remaining")
SHOWN = ("sensitivity", "accuracy", "speedup", *FACTS)
REASONS: dict[Reasons, dict[str, tuple[str, ...]]] = {
    "none": dict.fromkeys(OPERATORS, ()),
    "why": dict.fromkeys(OPERATORS, ("why",)),
    "reflection": {
        "generate": ("hypothesis",),
        "select": ("lesson",),
        "crossover": ("lesson", "hypothesis"),
        "mutate": ("lesson", "hypothesis"),
    },
}

_COMMON = frozenset({"layers", "last_layer", "target", "units", "example"})
_PAST = frozenset({*FACTS, "facts", "history", "effects", "lessons"})
_TASK = _COMMON | _PAST | {"sensitivity", "statistics", "margins", "candidates", "hint"}
_ALLOWED: dict[str, frozenset[str]] = {
    "system": _COMMON | {"model"},
    "generate": _TASK | {"parent"},
    "select": _COMMON | _PAST | {"candidates", "wanted"},
    "crossover": _TASK | {"first", "second"},
    "mutate": _TASK | {"parent"},
    "repair": _COMMON | {"error"},
}
_REQUIRED: dict[str, frozenset[str]] = {
    "system": frozenset(),
    "generate": frozenset({"example"}),
    "select": frozenset({"candidates", "wanted", "example"}),
    "crossover": frozenset({"first", "second", "example"}),
    "mutate": frozenset({"parent", "example"}),
    "repair": frozenset({"error"}),
}
_INSTEAD = {"parent": "margins"}  # a placeholder that may stand for a required one
_SWITCHES = {x: x for x in ("sensitivity", *FACTS)} | dict.fromkeys(
    ("statistics", "margins"), "sensitivity"
)
_REFLECTED = ("effects", "lessons")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KEYS = ("description", "forms", "shows", "hints")


@dataclass(frozen=True)
class Strategy:
    """The words of one strategy.

    Attributes:
        name: the folder's name.
        description: one line.
        forms: the form of the reply per operator.
        shows: which optional facts the prompts tell, a subset of `SHOWN`.
        reasons: which free text a reply carries, see `REASONS`.
        hints: advice of which slot i gets number i, modulo their count; may be empty.
        texts: system, the operators and repair, with placeholders.
    """

    name: str
    description: str
    forms: Mapping[str, Form]
    shows: tuple[str, ...]
    reasons: Reasons
    hints: tuple[str, ...]
    texts: Mapping[str, str]

    def placeholders(self, text: str) -> frozenset[str]:
        """Return the names that the text called `text` wants filled."""
        return frozenset(_PLACEHOLDER.findall(self.texts[text]))

    def render(self, text: str, values: Mapping[str, str]) -> str:
        """Return the text called `text` with its placeholders filled, once and literally.

        A line that the filling left empty is dropped.
        """
        lines = []
        for line in self.texts[text].strip().split("\n"):
            filled = _PLACEHOLDER.sub(lambda m: values[m.group(1)], line)
            if filled.strip() or not line.strip():
                lines.append(filled)
        return "\n".join(lines).strip()

    def words(self, operator: str) -> tuple[str, ...]:
        """Return the free text that a reply for this operator carries before its answer."""
        return REASONS[self.reasons][operator]

    def hint(self, slot: int) -> str:
        """Return the advice for this slot, or nothing."""
        return self.hints[slot % len(self.hints)] if self.hints else ""


def load_strategy(name: str) -> Strategy:
    """Return the strategy `name`: a folder here under `strategies/`, or a path.

    Raises:
        ValueError: there is no such folder, or a file is missing, has an unknown or lacks a
            necessary placeholder, or strategy.yaml is not as it should be.
    """
    home = Path(__file__).parent / "strategies"
    folder = home / name if (home / name).is_dir() and name == Path(name).name else Path(name)
    if not folder.is_dir():
        known = ", ".join(sorted(x.name for x in home.iterdir() if x.is_dir()))
        raise ValueError(f"search.strategy: got {name!r}, want a folder or one of {known}")
    settings = _settings(folder / "strategy.yaml")
    texts = {text: _text(folder / f"{text}.md", text, settings) for text in _ALLOWED}
    _check_told(folder / "strategy.yaml", settings["shows"], texts)
    return Strategy(name=folder.name, texts=texts, **settings)


def _settings(path: Path) -> dict[str, Any]:
    """Return the checked contents of strategy.yaml."""
    try:
        data = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or {*data, "reasons"} != {*_KEYS, "reasons"}:
        got = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        want = f"{', '.join(_KEYS)} and, if wanted, reasons"
        raise ValueError(f"{path}: got {got}, want exactly the keys {want}")
    reasons = data.get("reasons", "none")
    if not isinstance(reasons, str) or reasons not in REASONS:
        raise ValueError(f"{path}: reasons: got {reasons!r}, allowed {', '.join(REASONS)}")
    return {
        "description": str(data["description"]),
        "forms": _forms(path, data["forms"]),
        "shows": _strings(path, "shows", data["shows"], SHOWN),
        "reasons": reasons,
        "hints": _strings(path, "hints", data["hints"]),
    }


def _forms(path: Path, forms: Any) -> dict[str, Form]:
    if not isinstance(forms, dict) or set(forms) != set(OPERATORS):
        raise ValueError(f"{path}: forms wants exactly the keys {', '.join(OPERATORS)}")
    for operator, form in forms.items():
        if form not in FORMS[operator]:
            allowed = ", ".join(FORMS[operator])
            raise ValueError(f"{path}: forms.{operator}: got {form!r}, allowed {allowed}")
    return forms


def _strings(
    path: Path, key: str, value: Any, allowed: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{path}: {key} wants a list of strings")
    for word in value:
        if allowed is not None and word not in allowed:
            raise ValueError(f"{path}: {key}: got {word!r}, allowed {', '.join(allowed)}")
    return tuple(value)


def _text(path: Path, text: str, settings: Mapping[str, Any]) -> str:
    """Return the file's text, its placeholders checked."""
    content = _read(path)
    found = frozenset(_PLACEHOLDER.findall(content))
    allowed = ", ".join(sorted(_ALLOWED[text]))
    unknown = sorted(found - _ALLOWED[text])
    if unknown:
        raise ValueError(f"{path}: unknown placeholder {{{unknown[0]}}}, allowed: {allowed}")
    missing = sorted(x for x in _REQUIRED[text] - found if _INSTEAD.get(x) not in found)
    if missing:
        raise ValueError(f"{path}: placeholder {{{missing[0]}}} is missing, allowed: {allowed}")
    for name in sorted(found):
        if name in _SWITCHES and _SWITCHES[name] not in settings["shows"]:
            raise ValueError(f"{path}: {{{name}}} needs {_SWITCHES[name]} in shows, which is off")
        if name in _REFLECTED and settings["reasons"] != "reflection":
            raise ValueError(
                f"{path}: {{{name}}} needs reasons: reflection, got {settings['reasons']}"
            )
    return content


def _check_told(path: Path, shows: Sequence[str], texts: Mapping[str, str]) -> None:
    """Refuse a fact that is switched on but has no place in any text."""
    found = {name for text in texts.values() for name in _PLACEHOLDER.findall(text)}
    for fact in FACTS:
        if fact in shows and not found & {fact, "facts"}:
            raise ValueError(
                f"{path}: shows: {fact} is on, but no text has {{{fact}}} or {{facts}}"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: this file of the strategy is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None
