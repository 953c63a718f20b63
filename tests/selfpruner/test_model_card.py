"""The model card: valid front matter, true numbers, literal text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfpruner.model_card import model_card
from selfpruner.results import Results

SAMPLE = Path(__file__).parent / "results_sample.json"


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return data


def _card(data: dict[str, Any], stock: bool = False) -> tuple[dict[str, Any], str]:
    text = model_card(Results.model_validate(data), stock)
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_front_matter_names_the_base_model() -> None:
    front, _ = _card(_sample())
    assert front["base_model"] == "smollm2-135m-instruct"
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert "self-pruner" in front["tags"]


@pytest.mark.parametrize("stock", [True, False])
def test_loading_code_runs_as_python_and_trusts_only_where_needed(stock: bool) -> None:
    _, body = _card(_sample(), stock)
    blocks = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert len(blocks) == 1
    compile(blocks[0], "card", "exec")
    assert ("trust_remote_code=True" in blocks[0]) is not stock


def test_removed_units_stand_in_a_row_per_layer() -> None:
    data = _sample()
    _, body = _card(data)
    for row in data["units"]:
        left, dense = row["mlp_channels"], data["units_dense"]["mlp_channels"]
        gone = data["units_dense"]["kv_groups"] - row["kv_groups"]
        cells = (row["layer"], row["kv_groups"], row["q_per_group"], f"{left:,}", gone,
                 f"{dense - left:,}")  # fmt: skip
        assert "| " + " | ".join(map(str, cells)) + " |\n" in body


def test_numbers_and_limits_are_there() -> None:
    data = _sample()
    _, body = _card(data)
    for wanted in (
        "134,515,008 | 102,654,272",
        "passages, windows of 256 tokens | 17.42 | 29.86",
        "boolq, accuracy, 40 items, validation | 60.25 % | 55.00 %",
        "hellaswag, accuracy, 40 items, validation | 42.50 % | 37.50 %",
        "mean accuracy | 49.32 % | 45.00 %",
        "its 95 % interval includes zero",
        "at most 40 items a task",
        "Warning of the run: accuracy rests on 40 items",
        "refit of the remaining weights was kept.",
    ):
        assert wanted in body
    tables = [x for x in body.splitlines() if x.startswith("|")]
    assert {x.count("|") for x in tables} == {4, 7}


def test_skipped_parts_are_said() -> None:
    data = _sample()
    for side in ("dense", "pruned"):
        data["quality"][side].update(tasks={}, mean=None)
    data["quality"]["difference"] = None
    data["search"]["driver"] = None
    data["refit"] = None
    data["speed"]["rows"] = []
    _, body = _card(data)
    assert "Task accuracy was not measured." in body
    assert "Speed was not measured." in body
    assert "None" not in body
    assert "driven by" not in body


def test_hostile_text_stays_text() -> None:
    data = _sample()
    evil = "x\n---\n# Owned | <script>alert(1)</script> [go](https://evil.example) `code`: {{ 1 }}"
    data["model"].update(name=evil, family="a: [b\n- c")
    data["warnings"] = [evil]
    data["controls"] = {}
    for side in ("dense", "pruned"):
        data["quality"][side]["perplexity"] = {evil: 3.0}
    front, body = _card(data)
    assert front["base_model"] == " ".join(evil.split())
    assert front["tags"][-1] == "a: [b - c"
    assert "\n# Owned" not in body
    assert "\n---" not in body
    assert not re.search(r"(?<!\\)<", body)
    assert not re.search(r"(?<!\\)\[", body)
    assert "https://" not in body
    assert "{{ 1 }}" in body
    tables = [x for x in body.splitlines() if x.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in tables} == {4, 7}


def test_a_placebo_is_named() -> None:
    data = _sample()
    data["search"]["placebo"] = "layers"
    assert "under the placebo layers (a control)" in _card(data)[1]
    assert "placebo" not in _card(_sample())[1]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"mlp_channels": 32}, "MLP channels were removed. No"),
        ({"kv_groups": 1}, "KV groups were removed. No"),
        ({"q_per_group": 1, "mlp_channels": 32}, "query heads and MLP channels were removed. No"),
        (
            {"kv_groups": 1, "q_per_group": 1, "mlp_channels": 32},
            "KV groups, query heads and MLP channels were removed. No",
        ),
    ],
)
def test_what_was_removed_is_said_of_this_model(kept: dict[str, int], words: str) -> None:
    data = _sample()
    data["units"] = [{**x, **data["units_dense"], **kept} for x in data["units"]]
    assert words in _card(data)[1]


def test_layers_that_differ_are_said_to() -> None:
    assert "were removed, more in some layers than in others. No" in _card(_sample())[1]


def test_the_card_tells_in_what_and_on_what_both_were_judged() -> None:
    data = _sample()
    assert "judged in" not in _card(data)[1]
    data["environment"] |= {"dtype": "float32", "device": "cpu", "cpu": "A CPU", "gpus": ["A GPU"]}
    assert "Both models were judged in float32 on A CPU." in _card(data)[1]
    data["environment"]["device"] = "cuda"
    assert "Both models were judged in float32 on A GPU." in _card(data)[1]
