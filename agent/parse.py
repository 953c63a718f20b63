"""Replies of a driver, which are untrusted text, as typed proposals; and the schemas of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent.reply import ReplyError, find_object, short

Block = Literal["attention", "mlp"]
Schema = dict[str, Any]

MAX_MOVES = 6
WORDS = {"why": 200, "hypothesis": 160, "lesson": 160}
"""Free text that a reply may carry before its answer, with the most characters of each."""


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


def vectors_schema(bounds: Bounds, words: Sequence[str] = ()) -> Schema:
    """Return the JSON schema of `parse_vectors`."""
    rates = _array_schema(_integer_schema(*bounds.percent), bounds.layers, bounds.layers)
    return _reply_schema(words, dict.fromkeys(keys("vectors", bounds), rates))


def parse_vectors(text: str, bounds: Bounds, words: Sequence[str] = ()) -> Vectors:
    """Return the rates of `{"attention": [...], "mlp": [...]}` or `{"rates": [...]}`.

    Raises:
        ReplyError: the text holds no such object within `bounds` that has the `words` too.
    """
    names = keys("vectors", bounds)
    data = _reply(text, words, names)
    rows = [
        _integers(data[n], f'"{n}"', (bounds.layers, bounds.layers), bounds.percent) for n in names
    ]
    return Vectors(rows[0], rows[-1])


def moves_schema(bounds: Bounds, words: Sequence[str] = ()) -> Schema:
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
    return _reply_schema(words, {"moves": _array_schema(move, 1, MAX_MOVES)})


def parse_moves(text: str, bounds: Bounds, words: Sequence[str] = ()) -> tuple[Move, ...]:
    """Return the moves of `{"moves": [{"block", "take_from", "give_to", "units"}, ...]}`.

    The schema has one limit of units for both blocks; more than a block's own move as many as that.

    Raises:
        ReplyError: the text holds no such object within `bounds` that has the `words` too, or a
            move gives to the layer that it takes from.
    """
    value = _reply(text, words, keys("moves", bounds))["moves"]
    rows = _list(value, '"moves"', (1, MAX_MOVES))
    return tuple(_move(row, f"move {i + 1}", bounds) for i, row in enumerate(rows))


def mix_schema(bounds: Bounds, words: Sequence[str] = ()) -> Schema:
    """Return the JSON schema of `parse_mix`."""
    layer = _integer_schema(0, bounds.layers - 1)
    return _reply_schema(words, {"from_second": _array_schema(layer, 1, bounds.layers)})


def parse_mix(text: str, bounds: Bounds, words: Sequence[str] = ()) -> tuple[int, ...]:
    """Return the layers of `{"from_second": [...]}`, ascending and without repeats.

    Raises:
        ReplyError: the text holds no such object within `bounds` that has the `words` too.
    """
    value = _reply(text, words, keys("mix", bounds))["from_second"]
    sizes, values = (1, bounds.layers), (0, bounds.layers - 1)
    return tuple(sorted(set(_integers(value, '"from_second"', sizes, values))))


def select_schema(ids: Sequence[int], wanted: int, words: Sequence[str] = ()) -> Schema:
    """Return the JSON schema of `parse_select`."""
    choice = {"type": "integer", "enum": sorted(ids)}
    return _reply_schema(words, {"parents": _array_schema(choice, wanted, wanted)})


def parse_select(
    text: str, ids: Sequence[int], wanted: int, words: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the candidates of `{"parents": [...]}` without repeats, in the order given.

    Raises:
        ReplyError: the text holds no such object with `wanted` of the `ids` and the `words`.
    """
    value = _reply(text, words, ("parents",))["parents"]
    numbers = _integers(value, '"parents"', (wanted, wanted), (min(ids), max(ids)))
    unknown = [n for n in numbers if n not in set(ids)]
    if unknown:
        raise ReplyError(f'"parents": got {unknown[0]}, allowed {_listing(sorted(ids))}')
    return tuple(dict.fromkeys(numbers))


def keys(form: str, bounds: Bounds) -> tuple[str, ...]:
    """Return what a reply of this form answers with, beside its words."""
    rates = ("attention", "mlp") if bounds.blocks else ("rates",)
    answers = {"moves": "moves", "mix": "from_second", "select": "parents"}
    return rates if form == "vectors" else (answers[form],)


def parse_words(text: str, form: str, bounds: Bounds, words: Sequence[str]) -> dict[str, str]:
    """Return the free text of a reply of this form; it is to be stored and shown, never run.

    Raises:
        ReplyError: the text holds no object with these words and the answer of this form.
    """
    data = _reply(text, words, keys(form, bounds))
    return {name: data[name] for name in words}


def _reply(text: str, words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return the reply's object, its words checked."""
    data = find_object(text, (*words, *names))
    for word in words:
        value, most = data[word], WORDS[word]
        if not isinstance(value, str):
            raise ReplyError(f'"{word}" is {short(value)}, want text.')
        if len(value) > most:
            raise ReplyError(f'"{word}" has {len(value)} characters, allowed {most}.')
    return data


def _move(row: Any, name: str, bounds: Bounds) -> Move:
    keys = ("block", "take_from", "give_to", "units")
    if not isinstance(row, dict) or set(row) != set(keys):
        raise ReplyError(f"{name}: got {short(row)}, want an object with {_listing(keys)}")
    block = row["block"]
    if not isinstance(block, str) or block not in bounds.units:
        raise ReplyError(f"{name}: block is {short(block)}, allowed {_listing(bounds.units)}")
    layers = (0, bounds.layers - 1)
    take_from = _integer(row["take_from"], f"{name}: take_from", layers)
    give_to = _integer(row["give_to"], f"{name}: give_to", layers)
    units = _integer(row["units"], f"{name}: units", (1, max(bounds.units.values())))
    if take_from == give_to:
        raise ReplyError(f"{name}: take_from and give_to are both {give_to}, want two layers")
    return Move(block, take_from, give_to, min(units, bounds.units[block]))


def _list(value: Any, name: str, sizes: tuple[int, int]) -> list[Any]:
    low, high = sizes
    wanted = f"{low}" if low == high else f"{low} to {high}"
    if not isinstance(value, list):
        raise ReplyError(f"{name} is {short(value)}, want a list of {wanted} entries.")
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
        raise ReplyError(f"{name} is {short(value)}, want a whole number.")
    if not allowed[0] <= value <= allowed[1]:
        raise ReplyError(f"{name} is {short(value)}, allowed {allowed[0]} to {allowed[1]}.")
    return value


def _integer_schema(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _array_schema(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def _reply_schema(words: Sequence[str], answer: dict[str, Schema]) -> Schema:
    """Return the schema of a reply: words first, so that they are written before the answer."""
    texts: dict[str, Schema] = {x: {"type": "string", "maxLength": WORDS[x]} for x in words}
    return _object_schema({**texts, **answer})


def _object_schema(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _listing(names: Any) -> str:
    return ", ".join(str(name) for name in names)
