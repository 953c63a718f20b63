"""Prompt strategies: folders of text files with `{name}` placeholders that are checked on load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Form = Literal["vectors", "moves", "mix", "select"]

OPERATORS = ("generate", "select", "crossover", "mutate")
FORMS: dict[str, tuple[Form, ...]] = {
    "generate": ("vectors", "moves"),
    "select": ("select",),
    "crossover": ("vectors", "mix"),
    "mutate": ("vectors", "moves"),
}
SHOWN = ("accuracy", "speedup", "sensitivity")

_COMMON = frozenset({"layers", "last_layer", "target", "units", "example"})
_TASK = _COMMON | {"sensitivity", "candidates", "hint"}
_ALLOWED: dict[str, frozenset[str]] = {
    "system": _COMMON,
    "generate": _TASK | {"parent"},
    "select": _COMMON | {"candidates", "wanted"},
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
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KEYS = ("description", "forms", "shows", "hints")


@dataclass(frozen=True)
class Strategy:
    """The words of one strategy.

    Attributes:
        name: the folder's name.
        description: one line.
        forms: the form of the reply per operator.
        shows: which optional facts stand beside candidates and layers, a subset of `SHOWN`.
        hints: advice of which slot i gets number i, modulo their count; may be empty.
        texts: system, the operators and repair, with placeholders.
    """

    name: str
    description: str
    forms: Mapping[str, Form]
    shows: tuple[str, ...]
    hints: tuple[str, ...]
    texts: Mapping[str, str]

    def placeholders(self, text: str) -> frozenset[str]:
        """Return the names that the text called `text` wants filled."""
        return frozenset(_PLACEHOLDER.findall(self.texts[text]))

    def render(self, text: str, values: Mapping[str, str]) -> str:
        """Return the text called `text` with its placeholders filled, once and literally."""
        return _PLACEHOLDER.sub(lambda m: values[m.group(1)], self.texts[text]).strip()

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
    texts = {text: _text(folder / f"{text}.md", text) for text in _ALLOWED}
    return Strategy(name=folder.name, texts=texts, **settings)


def _settings(path: Path) -> dict[str, Any]:
    """Return the checked contents of strategy.yaml."""
    try:
        data = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or set(data) != set(_KEYS):
        got = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: got {got}, want exactly the keys {', '.join(_KEYS)}")
    forms = data["forms"]
    if not isinstance(forms, dict) or set(forms) != set(OPERATORS):
        raise ValueError(f"{path}: forms wants exactly the keys {', '.join(OPERATORS)}")
    for operator, form in forms.items():
        if form not in FORMS[operator]:
            allowed = ", ".join(FORMS[operator])
            raise ValueError(f"{path}: forms.{operator}: got {form!r}, allowed {allowed}")
    return {
        "description": str(data["description"]),
        "forms": forms,
        "shows": _strings(path, "shows", data["shows"], SHOWN),
        "hints": _strings(path, "hints", data["hints"]),
    }


def _strings(
    path: Path, key: str, value: Any, allowed: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{path}: {key} wants a list of strings")
    for word in value:
        if allowed is not None and word not in allowed:
            raise ValueError(f"{path}: {key}: got {word!r}, allowed {', '.join(allowed)}")
    return tuple(value)


def _text(path: Path, text: str) -> str:
    """Return the file's text, its placeholders checked."""
    content = _read(path)
    found = frozenset(_PLACEHOLDER.findall(content))
    allowed = ", ".join(sorted(_ALLOWED[text]))
    unknown = sorted(found - _ALLOWED[text])
    if unknown:
        raise ValueError(f"{path}: unknown placeholder {{{unknown[0]}}}, allowed: {allowed}")
    missing = sorted(_REQUIRED[text] - found)
    if missing:
        raise ValueError(f"{path}: placeholder {{{missing[0]}}} is missing, allowed: {allowed}")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: this file of the strategy is missing") from None
