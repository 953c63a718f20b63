"""Hardware and known models: what the files hold, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluators.harness import load_tasks
from selfpruner.config import TASKS
from selfpruner.costs import known_models
from selfpruner.costs.hardware import Hardware, load_hardware
from selfpruner.costs.judging import TASK_ROWS
from selfpruner.costs.known_models import architecture_by_name

GOOD = """
description: a machine
memory_gib: 10
reserved_gib: 1
tflops: {bfloat16: 100, float32: 10, float64: 1}
achievable: {products: 0.5, solves: 0.25}
bandwidth_gb: 1000
disk_gb: 1
layer_ms: 1
start_seconds: 0
price: {hour: 1}
"""


def written(folder: Path, text: str) -> str:
    (folder / "machine.yaml").write_text(text)
    return str(folder / "machine.yaml")


def test_hardware_from_a_path(tmp_path: Path) -> None:
    found = load_hardware(written(tmp_path, GOOD), devices=3)
    assert isinstance(found, Hardware)
    assert (found.devices, found.usable_bytes, found.price.currency) == (3, 9 * 2**30, "EUR")
    assert found.flops("bfloat16") == 50e12
    assert found.flops("float64", solves=True) == 0.25e12


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("memory_gib: 10", "memory: 10", "unknown key memory; did you mean memory_gib?"),
        ("products: 0.5", "products: 50", "achievable.products: got 50; allowed: less than"),
        ("layer_ms: 1\n", "", "layer_ms: not given; it is required"),
        ("reserved_gib: 1", "reserved_gib: 10", "reserved_gib: got 10; allowed: less than memory"),
    ],
)
def test_a_bad_file_is_one_line_a_fault(tmp_path: Path, old: str, new: str, line: str) -> None:
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError, match=r"machine\.yaml: ") as error:
        load_hardware(path)
    assert line in str(error.value)


def test_unknown_hardware_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"hardware: got 'A100'; did you mean a100-80gb\?"):
        load_hardware("A100")
    with pytest.raises(ValueError, match="allowed: a100-80gb, h100-80gb, h200, laptop-cpu"):
        load_hardware("abacus")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-13b", 13_015_864_320),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("META-LLAMA/llama-2-70b-HF", 68_976_648_192),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_models_by_any_of_their_names(name: str, parameters: int) -> None:
    assert architecture_by_name(name).total_parameters() == parameters


@pytest.mark.parametrize(("names", "found"), [("", []), ("org/Foo", ["org/foo"])])
def test_a_file_may_list_one_name_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, found: list[str]
) -> None:
    (tmp_path / "x.yaml").write_text(f"names: {names}\n")
    monkeypatch.setattr(known_models, "FOLDER", tmp_path)
    assert [*known_models._files()] == ["x", *found]


def test_an_unknown_model_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean meta-llama/Llama-2-7b-hf") as error:
        architecture_by_name("meta-llama/Llama-2-7b")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no architecture is known for 'x/y'; allowed: llama-2"):
        architecture_by_name("x/y")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: got "),
        ('{"model_type": "llama"}', "config.json: num_attention_heads is missing"),
        ('{"model_type": "bert"}', "model_type 'bert' is not supported"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        architecture_by_name(str(tmp_path))
    assert line in str(error.value)


def test_tasks_have_as_many_items_as_their_packaged_splits() -> None:
    loaded = load_tasks(TASKS)
    assert {x: TASK_ROWS[x].items for x in TASKS} == {x: len(loaded[x].eval_docs) for x in TASKS}
