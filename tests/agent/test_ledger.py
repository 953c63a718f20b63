"""The ledger: plain lines both ways, a torn end is cut, other damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from agent.candidate import Candidate
from agent.ledger import Charge, Ledger, LlmLine, read_lines
from pruning.plan import Plan

PLAN = Plan.from_json([[2, 1, 64], [1, 1, 32]])
CANDIDATE = Candidate(
    id=0,
    generation=0,
    slot=1,
    operator="generate",
    origin="llm",
    parents=(),
    genotype=((2, 1, 64), (1, 1, 32)),
    key=PLAN.key,
    scores={"fitness": 0.5, "stderr": 0.1, "sequences": 2, "of": 4, "values": [0.4, 1 / 3]},
    accuracy=None,
    speedup=1.5,
    tokens=12,
    seconds=0.25,
)
LINE = LlmLine(
    generation=0,
    slot=1,
    operator="generate",
    attempt=0,
    call=0,
    prompt_hash="abc",
    messages=({"role": "user", "content": "naïve\u2028line"},),
    reply='{"moves":[]}',
    tokens=30,
    estimated=False,
    cost=0.5,
    seconds=0.1,
    model="m",
    outcome="accepted",
)


def other(number: int) -> Candidate:
    rows = ((2, 1, 64), (1, 1, 32 * (number + 2)))
    key = Plan.from_json(rows).key
    scores = {"fitness": 0.5 - number / 10, "stderr": 0.0, "sequences": 4}
    return replace(
        CANDIDATE, id=number, generation=number, parents=(0,), genotype=rows, key=key, scores=scores
    )


def test_the_fields_are_the_contract(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_candidate(CANDIDATE)
    ledger.add_line(LINE)
    candidate = json.loads((tmp_path / "candidates.jsonl").read_text())
    assert " ".join(candidate) == (
        "id generation slot operator origin parents genotype key scores accuracy speedup tokens "
        "seconds"
    )
    assert list(candidate["scores"]) == ["fitness", "stderr", "sequences", "of", "values"]
    line = json.loads((tmp_path / "llm.jsonl").read_text())
    assert " ".join(line) == (
        "generation slot operator attempt call prompt_hash messages reply tokens estimated cost "
        "seconds model outcome"
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "run")
    ledger.add_candidate(CANDIDATE)
    ledger.add_candidate(other(1))
    ledger.add_line(LINE)
    again = Ledger(tmp_path / "new" / "run")
    assert again.candidates() == [CANDIDATE, other(1)]
    assert again.lines() == [LINE]
    assert again.find(PLAN.key) == CANDIDATE
    assert again.find("none") is None
    assert [x.id for x in again.best(5)] == [1, 0]
    assert [x.id for x in again.best(5, before=1)] == [0]
    assert again.attempts(0, 1, 0, "abc") == [LINE]
    assert again.attempts(0, 1, 1, "abc") == ()
    assert CANDIDATE.plan == PLAN
    assert again.candidates()[0].values.tolist() == [0.4, 1 / 3]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_cut_and_the_run_goes_on(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_candidate(CANDIDATE)
    ledger.add_candidate(other(1))
    path = tmp_path / "candidates.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Ledger(tmp_path)
    assert again.candidates() == [CANDIDATE]
    again.add_candidate(other(1))
    assert Ledger(tmp_path).candidates() == [CANDIDATE, other(1)]


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    Ledger(tmp_path).add_candidate(CANDIDATE)
    path = tmp_path / "candidates.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"candidates\.jsonl, line 1: not JSON"):
        Ledger(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": "oracle"}, "origin 'oracle', allowed llm, llm_repaired"),
        ({"key": "0" * 16}, "its genotype has"),
        ({"extra": 1}, "missing or unknown fields: extra"),
        ({"genotype": [[0, 1, 1]]}, "want three integers"),
    ],
)
def test_a_candidate_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidate.from_json({**CANDIDATE.to_json(), **change})


def test_charges_follow_the_order_of_operators(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for generation, operator in ((0, "generate"), (1, "select"), (1, "crossover"), (1, "mutate")):
        ledger.add_line(replace(LINE, generation=generation, operator=operator, tokens=10))
    skipped = {"reply": None, "tokens": 0, "cost": 0.0, "outcome": "skipped: search.tokens"}
    ledger.add_line(replace(LINE, generation=2, operator="select", **skipped))
    assert ledger.charged(0, "generate") == Charge()
    assert ledger.charged(1, "select") == Charge(1, 10, 0.5)
    assert ledger.charged(1, "mutate") == Charge(3, 30, 1.5)
    assert ledger.charged() == Charge(4, 40, 2.0)


def test_a_plan_is_charged_for_the_sequences_it_has_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for candidate in (CANDIDATE, other(1), other(2)):
        ledger.add_candidate(candidate)
    assert not CANDIDATE.is_complete
    assert other(1).is_complete
    assert [ledger.equivalents(before=x) for x in (0, 1, None)] == [
        0,
        Fraction(1, 2),
        Fraction(5, 2),
    ]


def test_of_equal_plans_the_complete_one_is_the_better(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_candidate(CANDIDATE)
    ledger.add_candidate(replace(other(1), scores={**other(1).scores, "fitness": 0.5}))
    ledger.add_candidate(replace(other(2), scores={**other(2).scores, "fitness": 0.6}))
    assert [x.id for x in ledger.best(3)] == [1, 0, 2]
    assert [x.id for x in ledger.best(3, complete=True)] == [1, 2]


def test_a_recording_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_line(LINE)
    path = tmp_path / "llm.jsonl"
    torn = path.read_bytes() + b'{"torn'
    path.write_bytes(torn)
    assert read_lines(path) == [LINE]
    assert path.read_bytes() == torn
    path.write_text('{"operator": "generate"}\n')
    with pytest.raises(ValueError, match=r"llm\.jsonl, line 1: not a call of an LLM"):
        read_lines(path)
