"""What is wrong with a configuration, one line each: where, what was got, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def complaints(
    tree: type[BaseModel], error: ValidationError, origin: Callable[[str], str]
) -> list[str]:
    """Return one line for each problem in `error`.

    Args:
        tree: model of the whole configuration; near misses are looked for in it.
        error: what pydantic found.
        origin: gives the file or option that a dotted name came from.
    """
    lines = []
    for problem in error.errors(include_url=False):
        path = named = ".".join(str(part) for part in problem["loc"] if _is_name(part))
        if problem["type"] == "extra_forbidden":
            text = f"unknown key {path}; {_advice(tree, path)}"
        elif problem["type"] == "missing":
            text = f"{path}: not given; it is required"
        elif problem["type"] == "value_error":
            text = _own_words(path, str(problem["ctx"]["error"]))
            named = text.partition(":")[0]  # a validator of a whole level names the key itself
        else:
            text = f"{path}: got {_shown(problem['input'])}; {_allowed(problem['msg'])}"
        lines.append(f"{origin(named)}: {text}")
    return list(dict.fromkeys(lines))


def _is_name(part: int | str) -> bool:
    """Return whether a piece of pydantic's location is a key or an index, not a type's name."""
    return isinstance(part, int) or part.isidentifier()


def _own_words(path: str, message: str) -> str:
    """Return the message of a validator of ours under the name of what it looked at."""
    if not path or message.startswith(f"{path}."):
        return message
    return f"{path}: {message}"


def _shown(value: Any) -> str:
    """Return the value as one short piece of text."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _allowed(message: str) -> str:
    """Return pydantic's sentence as `allowed: ...`."""
    text = " ".join(message.split()).removesuffix(".")
    for prefix in ("Input should be ", "Input should have "):
        if text.startswith(prefix):
            return "allowed: " + text.removeprefix(prefix)
    return "allowed: " + text[:1].lower() + text[1:]


def _advice(tree: type[BaseModel], path: str) -> str:
    """Return `did you mean ...?` or, when nothing is near, what is allowed there.

    The same name elsewhere in the tree beats a similar name at the same place.
    """
    parent, _, name = path.rpartition(".")
    every = list(_names(tree))
    here = [full for full in every if _without_indices(parent) == full.rpartition(".")[0]]
    moved = [full for full in every if full.rpartition(".")[2] == name]
    near = _nearest(name, here, 0.45) or _nearest(name, every, 0.75)
    found = moved[0] if moved else near
    if found:
        return f"did you mean {found}?"
    return "allowed: " + ", ".join(full.rpartition(".")[2] for full in here)


def _without_indices(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _nearest(name: str, candidates: Sequence[str], cutoff: float) -> str | None:
    """Return the candidate whose last part is most like `name`, if like enough."""
    by_name = {full.rpartition(".")[2]: full for full in reversed(candidates)}
    found = difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
    return by_name[found[0]] if found else None


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted name of the tree, parents first."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _inner_model(field.annotation)
        if inner is not None:
            yield from _names(inner, f"{prefix}{name}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as `tuple[Text, ...]` or `Text | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner_model, get_args(annotation))), None)
