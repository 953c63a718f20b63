"""Replies are read strictly; hostile ones become one sentence, never another exception."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import parse
from agent.parse import Bounds, Move, Vectors
from agent.reply import ReplyError, clean

BOUNDS = Bounds(3, (0, 90), {"mlp": 8, "attention": 2})
LAYERED = Bounds(3, (10, 90), {"mlp": 8}, blocks=False)


def test_vectors() -> None:
    text = '{"attention":[0,50,90],"mlp":[1,2,3]}'
    assert parse.parse_vectors(text, BOUNDS) == Vectors((0, 50, 90), (1, 2, 3))
    assert parse.parse_vectors(f"```json\n{text}\n```", BOUNDS).mlp == (1, 2, 3)
    layered = parse.parse_vectors('{"rates":[10,20,30]}', LAYERED)
    assert layered.attention == layered.mlp == (10, 20, 30)


@pytest.mark.parametrize(
    "text",
    [
        '{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}',
        '\n{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}\n\n',
        'Sure! {"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]} Good luck.',
        'As JSON:\n```json\n{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}\n```',
        '<think>{"moves":[]} or {x}?</think>'
        '{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}',
        'thought </think>{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}',
        '{a} {"n":1} {"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]} {"moves":[]}',
        '\ufeff{"moves":[{"units":2,"block":"mlp","take_from":0,"give_to":2}]}',
    ],
)
def test_the_first_fitting_object_counts_whatever_stands_around_it(text: str) -> None:
    assert parse.parse_moves(text, BOUNDS) == (Move("mlp", 0, 2, 2),)


WHY = ("why",)


def test_words_come_before_the_answer_and_are_bounded() -> None:
    schema = parse.mix_schema(BOUNDS, ("lesson", "hypothesis"))
    assert list(schema["properties"]) == ["lesson", "hypothesis", "from_second"]
    assert schema["properties"]["lesson"] == {"type": "string", "maxLength": 160}
    longest = "é" * 200
    text = json.dumps({"why": longest, "from_second": [1]})
    assert parse.parse_mix(text, BOUNDS, WHY) == (1,)
    assert parse.parse_words(text, "mix", BOUNDS, WHY) == {"why": longest}
    assert parse.parse_select('{"why":"","parents":[4]}', [4, 5], 1, WHY) == (4,)
    assert parse.parse_vectors('{"why":"","rates":[10,20,30]}', LAYERED, WHY).mlp == (10, 20, 30)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"why": "x" * 201, "from_second": [1]}, '"why" has 201 characters, allowed 200'),
        ({"why": 7, "from_second": [1]}, '"why" is 7, want text'),
        ({"why": None, "from_second": [1]}, '"why" is null, want text'),
        ({"why": ["x"], "from_second": [1]}, "want text"),
        ({"from_second": [1]}, "want an object with why, from_second"),
        ({"why": "x", "lesson": "x", "from_second": [1]}, "want an object with why, from_second"),
    ],
)
def test_hostile_words(data: dict[str, Any], message: str) -> None:
    for read in (
        lambda text: parse.parse_mix(text, BOUNDS, WHY),
        lambda text: parse.parse_words(text, "mix", BOUNDS, WHY),
    ):
        with pytest.raises(ReplyError) as caught:
            read(json.dumps(data))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain é 😀 \n", "plain é 😀 \n"),
        ("a\0b", "a\ufffdb"),
        ("a\ud800b", "a\ufffdb"),
        ("a\udc00", "a\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ufeffx", "\ufeffx"),
    ],
)
def test_clean_text_is_utf_8(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert clean(cleaned) == cleaned


@given(st.text(st.characters(), max_size=50))  # lone surrogates included
def test_clean_never_fails(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode() == cleaned
    assert "\0" not in cleaned


def test_moves() -> None:
    text = '{"moves":[{"block":"attention","take_from":0,"give_to":2,"units":2}]}'
    assert parse.parse_moves(text, BOUNDS) == (Move("attention", 0, 2, 2),)


def test_more_units_than_a_block_moves_are_as_many_as_it_does() -> None:
    """The schema's limit is that of the block that moves most."""
    assert parse.moves_schema(BOUNDS)["properties"]["moves"]["items"]["properties"]["units"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 8,
    }
    text = '{"moves":[{"block":"attention","take_from":0,"give_to":2,"units":8}]}'
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
        ('Plan: {"attention":[0,0,0]} done', "want an object with attention, mlp"),
        ('Plan: {"attention":[0,0,0],"mlp":[0,0,0],"x":1}', "want an object with attention, mlp"),
        ('Plan: [{"answer":{"attention":[0,0,0],"mlp":[0,0,0]}}]', "want an object with"),
        ('Plan: {"attention":[0,0,0],"mlp":[0,0,91]}', '"mlp", entry 3 is 91, allowed 0 to 90'),
        ('So: {"attention":[0,0,0],"attention":[0,0,0],"mlp":[0,0,0]}', "same key twice"),
        ('So: {"attention":[0,0,0],"mlp":[0,NaN,0]}', "NaN"),
        ('So: {"attention":[0,0,0],"mlp":[0,' + "9" * 5000 + ",0]}", "too long"),
        ('<think>{"attention":[0,0,0],"mlp":[0,0,0]}', "not one JSON object"),
        ('<think>{"attention":[0,0,0],"mlp":[0,0,0]}</think> Done.', "not one JSON object"),
        ("{ " * 32 + '{"attention":[0,0,0],"mlp":[0,0,0]}', "not one JSON object"),
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
        ("So: " + '{"a":' * 3000, ""),
        ("So: " + "{" * 19_000, "not one JSON object"),
        ("So: " + '{"a":[' * 3000, ""),
        ('{"attention":"\ud800","mlp":"\udfff"}', "want a list"),
        ("\ud800\0\udfff{", "not one JSON object"),
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
        ({"block": "attention", "take_from": 0, "give_to": 1, "units": 9}, "allowed 1 to 8"),
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


anything = st.text(st.characters(), max_size=200)  # lone surrogates included


@given(st.one_of(anything, st.binary(max_size=80).map(lambda b: b.decode("latin-1"))))
def test_any_text_gives_a_proposal_or_a_reply_error(text: str) -> None:
    for read in (parse.parse_vectors, parse.parse_moves, parse.parse_mix):
        with pytest.raises(ReplyError):
            read(text, BOUNDS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4),
    max_leaves=12,
)


around = st.text(st.sampled_from('{}[]":,<think>/ \n`a'), max_size=20)


@given(st.sampled_from(["moves", "from_second", "attention"]), json_values, around, around)
def test_any_value_under_the_right_key_is_survived(
    key: str, value: Any, before: str, after: str
) -> None:
    text = json.dumps({key: value} if key != "attention" else {key: value, "mlp": value})
    text = before + text + after
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
        return "maxLength" in schema or bool(schema["enum"])
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
        parse.moves_schema(BOUNDS, ("hypothesis",)),
        parse.select_schema([3, 1], 2, ("lesson",)),
    ):
        assert numbers_are_bounded(schema)
    assert list(parse.vectors_schema(LAYERED)["properties"]) == ["rates"]
    assert parse.vectors_schema(LAYERED)["properties"]["rates"]["items"]["minimum"] == 10
    assert parse.select_schema([3, 1], 2)["properties"]["parents"]["items"]["enum"] == [1, 3]
