"""Replies of a driver, which are untrusted text, as typed proposals; and the schemas of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Block = Literal["attention", "mlp"]
Schema = dict[str, Any]

MAX_CHARACTERS = 20_000
MAX_MOVES = 6


class ReplyError(ValueError):
    """What is wrong with a reply, in one sentence that the model is shown."""


@dataclass(frozen=True)
class Bounds:
    """What a reply may name.

    Attributes:
        layers: number of layers, at least 1.
        percent: smallest and largest whole per cent that may be removed from a block.
        units: largest number of units one move takes, per block that may be named.
        blocks: False where one rate holds for both blocks of a layer.
    """

    layers: int
    percent: tuple[int, int]
    units: dict[Block, int]
    blocks: bool = True


@dataclass(frozen=True)
class Vectors:
    """Per cent removed from the attention and from the MLP of every layer."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Units that one layer gives to the same block of another layer."""

    block: Block
    take_from: int
    give_to: int
    units: int


def vectors_schema(bounds: Bounds) -> Schema:
    """Return the JSON schema of `parse_vectors`."""
    rate = _integer_schema(*bounds.percent)
    names = ("attention", "mlp") if bounds.blocks else ("rates",)
    return _object_schema({n: _array_schema(rate, bounds.layers, bounds.layers) for n in names})


def parse_vectors(text: str, bounds: Bounds) -> Vectors:
    """Return the rates of `{"attention": [...], "mlp": [...]}` or `{"rates": [...]}`.

    Raises:
        ReplyError: the text is not exactly such an object within `bounds`.
    """
    names = ("attention", "mlp") if bounds.blocks else ("rates",)
    data = _object(text, names)
    rows = [
        _integers(data[n], f'"{n}"', (bounds.layers, bounds.layers), bounds.percent) for n in names
    ]
    return Vectors(rows[0], rows[-1])


def moves_schema(bounds: Bounds) -> Schema:
    """Return the JSON schema of `parse_moves`."""
    layer = _integer_schema(0, bounds.layers - 1)
    move = _object_schema(
        {
            "block": {"type": "string", "enum": sorted(bounds.units)},
            "take_from": layer,
            "give_to": layer,
            "units": _integer_schema(1, max(bounds.units.values())),
        }
    )
    return _object_schema({"moves": _array_schema(move, 1, MAX_MOVES)})


def parse_moves(text: str, bounds: Bounds) -> tuple[Move, ...]:
    """Return the moves of `{"moves": [{"block", "take_from", "give_to", "units"}, ...]}`.

    Raises:
        ReplyError: the text is not exactly such an object within `bounds`, or a move gives to
            the layer that it takes from.
    """
    rows = _list(_object(text, ("moves",))["moves"], '"moves"', (1, MAX_MOVES))
    return tuple(_move(row, f"move {i + 1}", bounds) for i, row in enumerate(rows))


def mix_schema(bounds: Bounds) -> Schema:
    """Return the JSON schema of `parse_mix`."""
    layer = _integer_schema(0, bounds.layers - 1)
    return _object_schema({"from_second": _array_schema(layer, 1, bounds.layers)})


def parse_mix(text: str, bounds: Bounds) -> tuple[int, ...]:
    """Return the layers of `{"from_second": [...]}`, ascending and without repeats.

    Raises:
        ReplyError: the text is not exactly such an object within `bounds`.
    """
    value = _object(text, ("from_second",))["from_second"]
    sizes, values = (1, bounds.layers), (0, bounds.layers - 1)
    return tuple(sorted(set(_integers(value, '"from_second"', sizes, values))))


def select_schema(ids: Sequence[int], wanted: int) -> Schema:
    """Return the JSON schema of `parse_select`."""
    choice = {"type": "integer", "enum": sorted(ids)}
    return _object_schema({"parents": _array_schema(choice, wanted, wanted)})


def parse_select(text: str, ids: Sequence[int], wanted: int) -> tuple[int, ...]:
    """Return the candidates of `{"parents": [...]}` without repeats, in the order given.

    Raises:
        ReplyError: the text is not exactly such an object with `wanted` of the `ids`.
    """
    value = _object(text, ("parents",))["parents"]
    numbers = _integers(value, '"parents"', (wanted, wanted), (min(ids), max(ids)))
    unknown = [n for n in numbers if n not in set(ids)]
    if unknown:
        raise ReplyError(f'"parents": got {unknown[0]}, allowed {_listing(sorted(ids))}')
    return tuple(dict.fromkeys(numbers))


def _move(row: Any, name: str, bounds: Bounds) -> Move:
    keys = ("block", "take_from", "give_to", "units")
    if not isinstance(row, dict) or set(row) != set(keys):
        raise ReplyError(f"{name}: got {_short(row)}, want an object with {_listing(keys)}")
    block = row["block"]
    if not isinstance(block, str) or block not in bounds.units:
        raise ReplyError(f"{name}: block is {_short(block)}, allowed {_listing(bounds.units)}")
    layers = (0, bounds.layers - 1)
    take_from = _integer(row["take_from"], f"{name}: take_from", layers)
    give_to = _integer(row["give_to"], f"{name}: give_to", layers)
    units = _integer(row["units"], f"{name}: units of {block}", (1, bounds.units[block]))
    if take_from == give_to:
        raise ReplyError(f"{name}: take_from and give_to are both {give_to}, want two layers")
    return Move(block, take_from, give_to, units)


def _object(text: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object that is all of `text` (one code fence around it is allowed)."""
    if len(text) > MAX_CHARACTERS:
        raise ReplyError(f"The reply has {len(text)} characters, allowed {MAX_CHARACTERS}.")
    try:
        data = json.loads(
            _unfenced(text), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ReplyError(
            f"The reply is not one JSON object: {error.msg} at character {error.pos}."
        ) from None
    except ReplyError:
        raise
    except (ValueError, RecursionError):
        raise ReplyError("The reply holds a number too long or is nested too deep.") from None
    if not isinstance(data, dict) or set(data) != set(keys):
        raise ReplyError(f"The reply is {_short(data)}, want an object with {_listing(keys)}.")
    return data


def _unfenced(text: str) -> str:
    lines = text.strip().split("\n")
    fenced = len(lines) > 2 and lines[0] in ("```", "```json") and lines[-1] == "```"
    return "\n".join(lines[1:-1]) if fenced else text.strip()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ReplyError("The reply has the same key twice in one object.")
    return data


def _refuse_constant(name: str) -> None:
    raise ReplyError(f"The reply holds {name}, want whole numbers only.")


def _list(value: Any, name: str, sizes: tuple[int, int]) -> list[Any]:
    low, high = sizes
    wanted = f"{low}" if low == high else f"{low} to {high}"
    if not isinstance(value, list):
        raise ReplyError(f"{name} is {_short(value)}, want a list of {wanted} entries.")
    if not low <= len(value) <= high:
        raise ReplyError(f"{name} has {len(value)} entries, want {wanted}.")
    return value


def _integers(
    value: Any, name: str, sizes: tuple[int, int], values: tuple[int, int]
) -> tuple[int, ...]:
    rows = _list(value, name, sizes)
    return tuple(_integer(x, f"{name}, entry {i + 1}", values) for i, x in enumerate(rows))


def _integer(value: Any, name: str, allowed: tuple[int, int]) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ReplyError(f"{name} is {_short(value)}, want a whole number.")
    if not allowed[0] <= value <= allowed[1]:
        raise ReplyError(f"{name} is {_short(value)}, allowed {allowed[0]} to {allowed[1]}.")
    return value


def _integer_schema(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _array_schema(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def _object_schema(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _listing(names: Any) -> str:
    return ", ".join(str(name) for name in names)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "a number too long"
    return text if len(text) <= 40 else text[:37] + "..."
