"""YAML text into plain data, and settings layered over one another with their origin kept."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

# A recipe's fitness or a file's budget means exactly its own names: these are never merged.
WHOLE_KEYS = ("budget", "fitness")

# YAML 1.1 reads 1e-3 as text for want of a dot; people mean a number.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of `node`; a repeated key is a YAML error with its line."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key} given twice", problem_mark=line)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain data that `text` holds.

    Raises:
        ValueError: not YAML, or a key given twice; the message names `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:  # such as the 45th of a month
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that the YAML file `path` holds; an empty file is an empty mapping.

    Raises:
        ValueError: no such file, not YAML, a key given twice, or not a mapping with text keys.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder, want a YAML file")
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    return checked_mapping({} if data is None else data, str(path))


def checked_mapping(data: Any, where: str) -> dict[str, Any]:
    """Return `data` if it is a mapping with text keys at every depth.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: got {data!r:.60}, want a mapping of settings")
    for key, value in data.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: got the key {key!r}, keys are text")
        if isinstance(value, dict):
            checked_mapping(value, where)
    return data


class Layers:
    """Settings laid over one another, later over earlier, with the origin of every key."""

    def __init__(self) -> None:
        """Start with no settings."""
        self.data: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def add(self, data: Mapping[str, Any], where: str) -> None:
        """Lay `data` on top: mappings merge key by key, all else (and WHOLE_KEYS) is replaced."""
        self.data = self._merge(self.data, data, "", where)

    def set(self, path: str, value: Any, where: str) -> None:
        """Set the one key at the dotted `path`.

        Raises:
            ValueError: a name on the way is empty or holds a plain value.
        """
        *parents, last = path.split(".")
        level = self.data
        for name in parents:
            level = level.setdefault(name, {})
            if not isinstance(level, dict):
                raise ValueError(f"{where}: {name} holds a value, not settings of its own")
        if "" in (*parents, last):
            raise ValueError(f"{where}: got {path!r}, want a name such as search.population")
        level[last] = value
        self._origins[path] = where

    def origin(self, path: str, default: str) -> str:
        """Return where the value at the dotted `path` was given, or `default`."""
        names = path.split(".")
        for length in range(len(names), 0, -1):
            found = self._origins.get(".".join(names[:length]))
            if found:
                return found
        return default

    def _merge(
        self, below: Mapping[str, Any], above: Mapping[str, Any], prefix: str, where: str
    ) -> dict[str, Any]:
        """Return `below` with `above` laid over it; note the origin of each key of `above`."""
        merged = dict(below)
        for key, value in above.items():
            path = prefix + key
            mergeable = isinstance(value, dict) and path not in WHOLE_KEYS
            if mergeable:
                old = below.get(key)
                merged[key] = self._merge(
                    old if isinstance(old, dict) else {}, value, path + ".", where
                )
            else:
                merged[key] = value
                self._origins[path] = where
        return merged
