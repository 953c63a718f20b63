"""GGUF files: stock llama.cpp runs them and continues a text as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pruning.export import export
from pruning.gguf import frequency_factors, interleaved, write_gguf
from pruning.plan import Plan
from pruning.slicing import sliced

UNEVEN = Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]])
UNIFORM = Plan.from_json([[2, 2, 32]] * 3)
ALL_HEADS = Plan.from_json([[4, 2, 32]] * 3)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tied": True}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
CASES = [
    ("llama", UNIFORM, "none", "llama"),
    ("llama", UNIFORM, "least_squares", "llama"),
    ("llama", UNEVEN, "none", "deci"),
    ("llama", UNEVEN, "least_squares", "deci"),
    ("llama with biases", UNIFORM, "none", "llama"),
    ("llama with biases", UNEVEN, "least_squares", "deci"),
    ("llama 3", UNIFORM, "none", "llama"),
    ("llama 3", UNEVEN, "least_squares", "deci"),
    ("llama linear", UNIFORM, "none", "llama"),
    ("llama linear", UNEVEN, "none", "deci"),
    ("mistral", UNIFORM, "none", "llama"),
    ("mistral", UNIFORM, "least_squares", "llama"),
    ("mistral", UNEVEN, "least_squares", "deci"),
    ("qwen2", ALL_HEADS, "none", "qwen2"),
    ("qwen2", ALL_HEADS, "least_squares", "deci"),
    ("qwen2", UNIFORM, "none", "deci"),
    ("qwen2", UNIFORM, "least_squares", "deci"),
    ("qwen2", UNEVEN, "none", "deci"),
    ("qwen2", UNEVEN, "least_squares", "deci"),
    ("qwen3", UNIFORM, "none", "qwen3"),
]


@pytest.fixture
def exported(make_model: Any, rank: Any, bpe: Any, tmp_path: Path) -> Any:
    """Export the pruned model of a kind to `tmp_path / "model"` and return it."""

    def made(kind: str, plan: Plan, reconstruction: str, **changed: Any) -> PreTrainedModel:
        family, fields = MODELS[kind]
        dense = make_model(family, dtype=torch.float32, vocab_size=len(bpe), **(fields | changed))
        small = sliced(rank(dense, reconstruction), plan)
        return export(small, bpe, tmp_path / "model", torch.float32).eval()

    return made


def _difference(engine: Any, model: PreTrainedModel, ids: list[int], tokenizer: Any) -> float:
    """Largest difference of the next token's log-probability, over the whole vocabulary."""
    size = len(tokenizer)
    found = engine.logprobs(ids, size, tokenizer.convert_tokens_to_ids("a"))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    assert sorted(found) == list(range(size))
    return max(abs(logprob - float(expected[token])) for token, logprob in found.items())


def _greedy(model: PreTrainedModel, ids: list[int], banned: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=banned,
    )
    continued: list[int] = made[0, len(ids) :].tolist()
    return continued


@pytest.mark.parametrize(("kind", "plan", "reconstruction", "architecture"), CASES)
def test_llama_cpp_continues_as_transformers_does(
    kind: str,
    plan: Plan,
    reconstruction: str,
    architecture: str,
    exported: Any,
    bpe: Any,
    llama_cpp: Any,
    make_tokens: Any,
    tmp_path: Path,
) -> None:
    model = exported(kind, plan, reconstruction)
    path = tmp_path / "model.gguf"
    assert write_gguf(tmp_path / "model", path, "f32") == architecture
    engine = llama_cpp(path)
    ends = bpe.convert_tokens_to_ids(["</s>", "<|endoftext|>"])
    for ids in make_tokens(3, 70).tolist():
        assert engine.continued(ids, 24) == _greedy(model, ids, ends)
        assert _difference(engine, model, ids, bpe) < 1e-5


@pytest.mark.parametrize("plan", [UNIFORM, UNEVEN], ids=["uniform", "uneven"])
def test_the_file_says_what_each_layer_keeps(plan: Plan, exported: Any, tmp_path: Path) -> None:
    exported("llama", plan, "none")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    name = fields["general.architecture"].contents()
    found = {
        key: fields[f"{name}.{key}"].contents()
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    }
    layers = plan.layers
    columns = {
        "attention.head_count": [x.kv_groups * x.q_per_group for x in layers],
        "attention.head_count_kv": [x.kv_groups for x in layers],
        "feed_forward_length": [x.mlp_channels for x in layers],
    }
    expected = {key: x[0] if plan is UNIFORM else x for key, x in columns.items()}
    assert found == expected
    assert fields[f"{name}.block_count"].contents() == 3
    assert fields[f"{name}.context_length"].contents() == 128


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_matrices_have_the_type_asked_for(dtype: Any, exported: Any, tmp_path: Path) -> None:
    state = exported("qwen2", UNEVEN, "least_squares", tied=True).state_dict()
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", dtype)
    tensors = {x.name: x for x in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert "output.weight" not in tensors
    for name, tensor in tensors.items():
        row = int(tensor.shape[0])  # ggml counts from the innermost
        wanted = "F32" if len(tensor.shape) == 1 else dtype.upper()
        if wanted == "Q8_0" and row % 32:
            wanted = "F16"
        assert tensor.tensor_type.name == wanted, name
    kinds = {x.tensor_type.name for x in tensors.values()}
    assert kinds == {"f32": {"F32"}, "f16": {"F32", "F16"}, "q8_0": {"F32", "F16", "Q8_0"}}[dtype]
    down = tensors["blk.1.ffn_up.weight"]
    values = gguf.dequantize(down.data, down.tensor_type)
    expected = state["model.layers.1.mlp.up_proj.weight"].numpy()
    tolerance = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}[dtype]
    assert np.abs(values - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_smaller_types_run(
    dtype: Any, exported: Any, bpe: Any, llama_cpp: Any, make_tokens: Any, tmp_path: Path
) -> None:
    model = exported("llama", UNEVEN, "least_squares")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", dtype)
    (ids,) = make_tokens(1, 20).tolist()
    difference = _difference(llama_cpp(tmp_path / "x.gguf"), model, ids, bpe)
    assert 1e-5 < difference < {"f16": 0.01, "q8_0": 0.1}[dtype]


def test_shards_are_read_one_after_the_other(exported: Any, tmp_path: Path) -> None:
    model = exported("llama", UNEVEN, "none")
    write_gguf(tmp_path / "model", tmp_path / "one.gguf", "f32")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    write_gguf(tmp_path / "model", tmp_path / "two.gguf", "f32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_rotary_pairs_become_neighbours() -> None:
    rows = np.arange(8, dtype=np.float32)  # two heads of size 4: pairs (0, 2), (1, 3)
    assert interleaved(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    matrix = np.stack([rows, -rows], axis=1)
    assert interleaved(matrix, 2)[:, 1].tolist() == [0, -2, -1, -3, -4, -6, -5, -7]


def test_frequency_factors_are_those_of_transformers(make_model: Any) -> None:
    plain, scaled = (
        make_model("llama", **fields).model.rotary_emb.inv_freq.double().numpy()
        for fields in ({}, {"rope_parameters": LLAMA3})
    )
    factors = frequency_factors(make_model("llama", rope_parameters=LLAMA3).config)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, plain / scaled, rtol=1e-5)
    assert factors[0] == 1
    assert 1 < factors[1] < 8
    assert factors[-1] == 8


REFUSED = [
    (
        ("qwen3", UNEVEN, "none", {}),
        "config.json: no architecture of llama.cpp holds this qwen3 model: "
        "qwen3 has no layers of different widths, deci has no norms on queries and keys",
    ),
    (
        ("qwen3", UNIFORM, "least_squares", {}),
        "config.json: no architecture of llama.cpp holds this qwen3 model: "
        "qwen3 has no bias on down_proj, o_proj, deci has no norms on queries and keys",
    ),
    (
        ("mistral", UNEVEN, "none", {"sliding_window": 64}),
        "config.json: sliding_window 64; llama.cpp's llama has none",
    ),
    (
        ("llama", UNIFORM, "none", {"hidden_act": "gelu"}),
        "config.json: hidden_act 'gelu'; llama.cpp computes llama with silu",
    ),
    (
        (
            "llama",
            UNIFORM,
            "none",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ),
        "config.json: rope_type 'dynamic' is not supported in GGUF; "
        "supported: default, linear, llama3",
    ),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(
    case: Any, message: str, exported: Any, tmp_path: Path
) -> None:
    kind, plan, reconstruction, changed = case
    exported(kind, plan, reconstruction, **changed)
    with pytest.raises(ValueError, match=r"^config") as caught:
        write_gguf(tmp_path / "model", tmp_path / "x.gguf")
    assert str(caught.value) == message
    assert {x.name for x in tmp_path.iterdir()} == {"model"}


def test_a_window_as_wide_as_the_context_is_none(exported: Any, tmp_path: Path) -> None:
    exported("mistral", UNEVEN, "none", sliding_window=128)
    assert write_gguf(tmp_path / "model", tmp_path / "x.gguf") == "deci"


def test_values_beyond_float16_leave_no_file(exported: Any, bpe: Any, tmp_path: Path) -> None:
    model = exported("llama", UNEVEN, "none")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    export(model, bpe, tmp_path / "model", torch.float32)
    with pytest.raises(ValueError, match=r"up_proj\.weight: 100000\.0 does not fit float16"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16")
    assert {x.name for x in tmp_path.iterdir()} == {"model"}
    assert write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32") == "deci"


def test_damaged_folders_are_refused(exported: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, file = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    with pytest.raises(ValueError, match=r"model: no config\.json"):
        write_gguf(folder, tmp_path / "x.gguf")
    exported("llama", UNEVEN, "none")
    state = load_file(file)
    odd = {"model.layers.0.extra": torch.zeros(1)}
    save_file(state | odd, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for the tensor model\.layers\.0\.extra"):
        write_gguf(folder, tmp_path / "x.gguf")
    state.pop("model.norm.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor model\.norm\.weight"):
        write_gguf(folder, tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        write_gguf(folder, tmp_path / "x.gguf")
    file.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        write_gguf(folder, tmp_path / "x.gguf")


def test_stored_rotary_frequencies_are_left_out(exported: Any, tmp_path: Path) -> None:
    """Checkpoints of the first Llama 2 bring them; everybody computes them."""
    exported("llama", UNEVEN, "none")
    write_gguf(tmp_path / "model", tmp_path / "one.gguf", "f32")
    file = tmp_path / "model" / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    write_gguf(tmp_path / "model", tmp_path / "two.gguf", "f32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
