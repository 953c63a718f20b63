"""Architectures by the name of a model, from files at hand: no network, no weights, no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruning.architecture import Architecture
from selfpruner.config import CONFIGS
from selfpruner.yaml_text import read_mapping

FOLDER = CONFIGS / "models"


def architecture_by_name(model: str) -> Architecture:
    """Return the architecture of a folder with a config.json, or of a model in `configs/models`.

    A file there is found by its own name or by one of its `names`, hub ids or packaged models;
    capitals do not matter.

    Raises:
        ValueError: no file at hand describes the model, or the one that does is no good; one line.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        return _architecture(_config_of(folder / "config.json"), folder / "config.json")
    files = _files()
    path = files.get(model.lower())
    if path is None:
        near = difflib.get_close_matches(model.lower(), files, n=1, cutoff=0.5)
        hint = f"did you mean {_spelled(near[0])}? " if near else ""
        raise ValueError(
            f"model: no architecture is known for {model!r}; {hint}allowed: "
            f"{', '.join(sorted({x.stem for x in files.values()}))} and their hub ids, a folder "
            f"with a config.json, or one more file of its keys as {FOLDER.name}/NAME.yaml "
            "in configs"
        )
    return _architecture(read_mapping(path), path)


def _files() -> dict[str, Path]:
    """Return the file of every known name, in small letters."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for name in (path.stem, *_names(path)):
            found[name.lower()] = path
    return found


def _names(path: Path) -> list[str]:
    """Return the other names that a file lists: one or several."""
    names = read_mapping(path).get("names") or []
    return [str(x) for x in names] if isinstance(names, list) else [str(names)]


def _spelled(name: str) -> str:
    """Return a known name as its file has it."""
    path = _files()[name]
    return next((x for x in _names(path) if x.lower() == name), path.stem)


def _config_of(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: got {data!r:.60}, want a mapping")
    return data


def _architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    try:
        return Architecture.from_config(config)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
