"""Replies are read strictly; hostile ones become one sentence, never another exception."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import parse
from agent.parse import Bounds, Move, ReplyError, Vectors

BOUNDS = Bounds(3, (0, 90), {"mlp": 8, "attention": 2})
LAYERED = Bounds(3, (10, 90), {"mlp": 8}, blocks=False)


def test_vectors() -> None:
    text = '{"attention":[0,50,90],"mlp":[1,2,3]}'
    assert parse.parse_vectors(text, BOUNDS) == Vectors((0, 50, 90), (1, 2, 3))
    assert parse.parse_vectors(f"```json\n{text}\n```", BOUNDS).mlp == (1, 2, 3)
    layered = parse.parse_vectors('{"rates":[10,20,30]}', LAYERED)
    assert layered.attention == layered.mlp == (10, 20, 30)


def test_moves() -> None:
    text = '{"moves":[{"block":"attention","take_from":0,"give_to":2,"units":2}]}'
    assert parse.parse_moves(text, BOUNDS) == (Move("attention", 0, 2, 2),)


def test_mix_and_select() -> None:
    assert parse.parse_mix('{"from_second":[2,0,2]}', BOUNDS) == (0, 2)
    assert parse.parse_select('{"parents":[7,4]}', [4, 5, 7], 2) == (7, 4)
    assert parse.parse_select('{"parents":[5,5]}', [4, 5, 7], 2) == (5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not one JSON object"),
        ("Sure! Here is a plan.", "not one JSON object"),
        ('{"attention":[0,0,0],"mlp":[0,0', "not one JSON object"),
        ('{"attention":[0,0,0],"mlp":[0,0,0]} done', "not one JSON object"),
        ("[1,2,3]", "want an object with attention, mlp"),
        ('{"attention":[0,0,0]}', "want an object with attention, mlp"),
        ('{"attention":[0,0,0],"mlp":[0,0,0],"x":1}', "want an object with attention, mlp"),
        ('{"attention":[0,0,0],"mlp":[0,0]}', '"mlp" has 2 entries, want 3'),
        ('{"attention":[0,0,0],"mlp":7}', '"mlp" is 7, want a list'),
        ('{"attention":[0,0,0],"mlp":[0,91,0]}', '"mlp", entry 2 is 91, allowed 0 to 90'),
        ('{"attention":[0,0,0],"mlp":[0,-1,0]}', "allowed 0 to 90"),
        ('{"attention":[0,0,0],"mlp":[0,0.5,0]}', "want a whole number"),
        ('{"attention":[0,0,0],"mlp":[0,true,0]}', "want a whole number"),
        ('{"attention":[0,0,0],"mlp":[0,"5",0]}', "want a whole number"),
        ('{"attention":[0,0,0],"mlp":[0,[[5]],0]}', "want a whole number"),
        ('{"attention":[0,0,0],"mlp":[0,NaN,0]}', "NaN"),
        ('{"attention":[0,0,0],"mlp":[0,-Infinity,0]}', "Infinity"),
        ('{"attention":[0,0,0],"attention":[0,0,0],"mlp":[0,0,0]}', "same key twice"),
        ('{"attention":[0,0,0],"mlp":[0,' + "9" * 5000 + ",0]}", "too long"),
        ('{"attention":[0,0,0],"mlp":[0,' + "9" * 400 + ",0]}", "allowed 0 to 90"),
        ("[" * 19_000, ""),
        ('{"a":' * 3000, ""),
        ("x" * 20_001, "20001 characters, allowed 20000"),
    ],
)
def test_hostile_vectors(text: str, message: str) -> None:
    with pytest.raises(ReplyError) as caught:
        parse.parse_vectors(text, BOUNDS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ({"block": "mlp", "take_from": 1, "give_to": 1, "units": 1}, "both 1"),
        ({"block": "mlp", "take_from": 3, "give_to": 1, "units": 1}, "take_from is 3"),
        ({"block": "mlp", "take_from": 0, "give_to": -1, "units": 1}, "give_to is -1"),
        ({"block": "attention", "take_from": 0, "give_to": 1, "units": 3}, "allowed 1 to 2"),
        ({"block": "mlp", "take_from": 0, "give_to": 1, "units": 0}, "allowed 1 to 8"),
        ({"block": "head", "take_from": 0, "give_to": 1, "units": 1}, "block is"),
        ({"block": ["mlp"], "take_from": 0, "give_to": 1, "units": 1}, "block is"),
        ({"block": "mlp", "take_from": 0, "give_to": 1}, "want an object with"),
        (5, "want an object with"),
    ],
)
def test_hostile_moves(move: Any, message: str) -> None:
    with pytest.raises(ReplyError, match=message):
        parse.parse_moves(json.dumps({"moves": [move]}), BOUNDS)
    with pytest.raises(ReplyError, match="want 1 to 6"):
        parse.parse_moves(json.dumps({"moves": [move] * 7}), BOUNDS)


def test_hostile_mix_and_select() -> None:
    with pytest.raises(ReplyError, match="has 0 entries"):
        parse.parse_mix('{"from_second":[]}', BOUNDS)
    with pytest.raises(ReplyError, match="allowed 0 to 2"):
        parse.parse_mix('{"from_second":[3]}', BOUNDS)
    with pytest.raises(ReplyError, match="got 6, allowed 4, 5, 7"):
        parse.parse_select('{"parents":[4,6]}', [4, 5, 7], 2)
    with pytest.raises(ReplyError, match="has 1 entries, want 2"):
        parse.parse_select('{"parents":[4]}', [4, 5, 7], 2)


@given(st.one_of(st.text(max_size=200), st.binary(max_size=80).map(lambda b: b.decode("latin-1"))))
def test_any_text_gives_a_proposal_or_a_reply_error(text: str) -> None:
    for read in (parse.parse_vectors, parse.parse_moves, parse.parse_mix):
        with pytest.raises(ReplyError):
            read(text, BOUNDS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["moves", "from_second", "attention"]), json_values)
def test_any_value_under_the_right_key_is_survived(key: str, value: Any) -> None:
    text = json.dumps({key: value} if key != "attention" else {key: value, "mlp": value})
    for read in (parse.parse_vectors, parse.parse_moves, parse.parse_mix):
        with contextlib.suppress(ReplyError):
            read(text, BOUNDS)


def numbers_are_bounded(schema: dict[str, Any]) -> bool:
    kind = schema["type"]
    if kind == "integer":
        return "enum" in schema or {"minimum", "maximum"} <= set(schema)
    if kind == "array":
        return {"minItems", "maxItems"} <= set(schema) and numbers_are_bounded(schema["items"])
    if kind == "string":
        return bool(schema["enum"])
    closed = schema["additionalProperties"] is False
    return (
        closed
        and schema["required"] == list(schema["properties"])
        and all(map(numbers_are_bounded, schema["properties"].values()))
    )


def test_schemas_are_closed_and_bounded() -> None:
    for schema in (
        parse.vectors_schema(BOUNDS),
        parse.vectors_schema(LAYERED),
        parse.moves_schema(BOUNDS),
        parse.mix_schema(BOUNDS),
        parse.select_schema([3, 1], 2),
    ):
        assert numbers_are_bounded(schema)
    assert list(parse.vectors_schema(LAYERED)["properties"]) == ["rates"]
    assert parse.vectors_schema(LAYERED)["properties"]["rates"]["items"]["minimum"] == 10
    assert parse.select_schema([3, 1], 2)["properties"]["parents"]["items"]["enum"] == [1, 3]
