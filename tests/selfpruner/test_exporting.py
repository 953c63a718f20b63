"""The command `export`: a finished run for another engine, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from pruning.export import export
from pruning.modeling_pruned import PrunedLlamaConfig, PrunedLlamaForCausalLM
from selfpruner.cli import main
from selfpruner.config import RunConfig
from selfpruner.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run whose model has two layers that differ."""
    folder = RunFolder.create(tmp_path / "run", RunConfig(model="m"))
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["ab ab"],
        BpeTrainer(show_progress=False, special_tokens=["</s>"], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    config = PrunedLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        per_layer_config={0: {"intermediate_size": 64}, 1: {"intermediate_size": 32}},
    )
    torch.manual_seed(0)
    export(PrunedLlamaForCausalLM(config), tokenizer, folder.model, torch.float32)
    (folder.model / "README.md").write_text("card")
    folder.results.write_text("{}")
    return folder


def selfpruner(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def refusal(*arguments: Any) -> str:
    result = selfpruner(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    line: str = result.stderr.removeprefix("selfpruner: ").removesuffix("\n")
    return line


def test_gguf_lies_in_the_run(run: RunFolder) -> None:
    result = selfpruner(run, "--to", "gguf")
    assert result.exit_code == 0, result.output
    size = run.gguf.stat().st_size / 1e6
    assert result.stdout == f"{run.gguf}: f16, architecture deci, {size:.1f} MB\n"
    assert GGUFReader(run.gguf).fields["general.architecture"].contents() == "deci"


def test_gguf_goes_where_it_is_asked_to(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.gguf"
    assert selfpruner(run, "--to", "gguf", "--dtype", "q8_0", "--out", out).exit_code == 0
    kinds = {x.tensor_type.name for x in GGUFReader(out).tensors}
    assert kinds == {"F32", "Q8_0"}
    assert not run.gguf.exists()


def test_hf_is_a_copy(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    assert selfpruner(run, "--to", "hf", "--out", out).exit_code == 0
    copied = {x.name: x.read_bytes() for x in out.iterdir()}
    assert copied == {x.name: x.read_bytes() for x in run.model.iterdir()}


def test_a_stopped_export_leaves_nothing_in_the_way(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    out = tmp_path / "half"
    command = ("--to", "hf", "--dtype", "f16", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", stopped)
        assert selfpruner(run, *command).exit_code != 0
    assert not out.exists()
    assert selfpruner(run, *command).exit_code == 0
    assert not list(tmp_path.glob(".*"))


def test_hf_in_another_type(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert selfpruner(run, "--to", "hf", "--dtype", "f16", "--out", out).exit_code == 0
    half, full = (AutoModelForCausalLM.from_pretrained(x) for x in (out, run.model))
    assert half.dtype == torch.float16
    card = (out / "README.md").read_text()
    assert card.endswith("converted to float16 after all measurements.\n")
    for name, parameter in full.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.half()), name
    assert {x.name for x in out.iterdir()} == {x.name for x in run.model.iterdir()}
    assert "AutoModel" in json.loads((out / "config.json").read_text())["auto_map"]


def test_a_model_that_is_no_run_is_exported_too(run: RunFolder, tmp_path: Path) -> None:
    """The dense model, to be set beside the pruned one in the same type."""
    out = tmp_path / "dense.gguf"
    assert "--out: got None" in refusal(run.model, "--to", "gguf")
    assert selfpruner(run.model, "--to", "gguf", "--dtype", "f32", "--out", out).exit_code == 0
    assert selfpruner(run, "--to", "gguf", "--dtype", "f32").exit_code == 0
    assert out.read_bytes() == run.gguf.read_bytes()
    folder = tmp_path / "half"
    assert selfpruner(run.model, "--to", "hf", "--dtype", "bf16", "--out", folder).exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_refusals_are_one_line(run: RunFolder, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    gguf, hf = (run, "--to", "gguf"), (run, "--to", "hf")
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere, "--to", "gguf") == (
        f"{nowhere}: no folder; --to hf --out FOLDER writes one of any model"
    )
    assert refusal(nowhere, "--to", "hf", "--out", tmp_path / "y").startswith("model: unknown")
    assert refusal(*gguf, "--dtype", "bf16").startswith("--dtype: got bf16; allowed with --to gguf")
    assert refusal(*hf) == f"--out: not given; {run.model} is a Hugging Face folder already"
    assert refusal(*hf, "--out", taken) == f"--out: {taken} exists; choose another"
    assert refusal(*hf, "--dtype", "q8_0", "--out", tmp_path / "y") == (
        "--dtype: got q8_0; allowed with --to hf: bf16, f32, f16"
    )
    assert refusal(*gguf, "--out", taken) == (
        f"--out: got {taken}; allowed: a file whose name ends in .gguf"
    )
    run.results.unlink()
    assert refusal(*gguf) == f"{run.model}: missing; has the run finished?"
    assert not run.gguf.exists()


def test_what_llama_cpp_cannot_run_is_one_line(run: RunFolder) -> None:
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert refusal(run, "--to", "gguf") == (
        "config.json: hidden_act 'gelu'; llama.cpp computes llama with silu"
    )
    assert not run.gguf.exists()
