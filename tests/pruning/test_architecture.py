"""Parameter and MAC counts, from configurations alone and against real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from pruning.architecture import FAMILIES, Architecture
from pruning.families import family_of
from pruning.plan import LayerPlan, Plan

MODELS = Path(__file__).parents[2] / "configs" / "models"
TINYLLAMA = Architecture("llama", 22, 2048, 32, 4, 64, 5632, 32000, False)


def _architecture(name: str) -> Architecture:
    return Architecture.from_config(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))


def _llm_pruner_plan(architecture: Architecture, ratio: float, first: int, last: int) -> Plan:
    """LLM-Pruner's local rule in layers first to last: KV groups by floor, channels exactly."""
    width = architecture.kv_heads * architecture.head_dim
    groups = (width - int(width * (1 - ratio))) // architecture.head_dim
    pruned = LayerPlan(
        architecture.kv_heads - groups,
        architecture.q_per_group,
        int(architecture.mlp * (1 - ratio)),
    )
    dense = Plan.dense(architecture).layers
    return Plan((*dense[:first], *(pruned,) * (last - first + 1), *dense[last + 1 :]))


def _real_count(model: PreTrainedModel) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    architecture = _architecture(name)
    assert architecture.total_parameters() == parameters
    assert architecture.total_parameters(Plan.dense(architecture)) == parameters


@pytest.mark.parametrize(
    ("name", "ratio", "first", "last", "parameters"),
    [
        ("llama-2-7b", 0.25, 4, 29, 5_422_977_024),
        ("llama-2-7b", 0.60, 3, 30, 3_350_188_032),
        ("llama-3-8b", 0.25, 4, 29, 6_612_586_496),
    ],
)
def test_llm_pruner_sizes(name: str, ratio: float, first: int, last: int, parameters: int) -> None:
    architecture = _architecture(name)
    plan = _llm_pruner_plan(architecture, ratio, first, last)
    assert architecture.total_parameters(plan) == parameters


def test_llm_pruner_sizes_of_tinyllama() -> None:
    plan = _llm_pruner_plan(TINYLLAMA, 0.25, 4, 17)
    assert TINYLLAMA.total_parameters() == 1_100_048_384
    assert TINYLLAMA.total_parameters(plan) == 945_907_712


def test_seven_billion_keeps_24_heads_and_8256_channels() -> None:
    plan = _llm_pruner_plan(_architecture("llama-2-7b"), 0.25, 4, 29)
    assert plan.layers[3:5] == (LayerPlan(32, 1, 11008), LayerPlan(24, 1, 8256))
    assert plan.layers[29:31] == (LayerPlan(24, 1, 8256), LayerPlan(32, 1, 11008))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_counts_real_parameters(
    make_model: Callable[..., PreTrainedModel],
    family: str,
    fields: dict[str, Any],
    kv_heads: int,
    tied: bool,
) -> None:
    model = make_model(family, kv_heads=kv_heads, tied=tied, **fields)
    _, architecture = family_of(model)
    assert architecture.total_parameters() == _real_count(model)
    assert architecture.total_parameters() == (
        architecture.block_parameters() + architecture.fixed_parameters()
    )


def test_block_parameters_are_the_projections(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("qwen2", kv_heads=2)
    _, architecture = family_of(model)
    inputs = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    counted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(f"{role}." in name for role in inputs)
        or name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    assert architecture.block_parameters() == counted


def test_correction_biases_are_two_a_layer_unless_there_already() -> None:
    plain = Architecture("llama", 3, 64, 8, 4, 8, 48, 120, False)
    assert plain.fixed_parameters(True) - plain.fixed_parameters() == 3 * 2 * 64
    biased = Architecture("llama", 3, 64, 8, 4, 8, 48, 120, False, True, True, True)
    assert biased.fixed_parameters(True) == biased.fixed_parameters()


def test_macs_by_hand() -> None:
    """Two tokens, hidden 4, two heads of 2 on one KV head, 3 channels, vocabulary 5."""
    tiny = Architecture("llama", 1, 4, 2, 1, 2, 3, 5, False)
    projections = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4)
    scores = 2 * (2 * 2 * 2)  # two heads, 2 x 2 products of length 2
    mlp = 2 * 3 * 4 * 3
    head = 2 * 4 * 5
    assert tiny.total_macs(Plan.dense(tiny), 2) == projections + 2 * scores + mlp + head


def test_macs_of_llm_pruner_table() -> None:
    """Published: 424.02 G dense; norms, softmax, rotation and activations are not ours (< 0.1%)."""
    architecture = _architecture("llama-2-7b")
    dense = architecture.total_macs(Plan.dense(architecture), 64) / 1e9
    assert dense == pytest.approx(424.02, rel=1e-3)
    assert dense < 424.02
    pruned = architecture.total_macs(_llm_pruner_plan(architecture, 0.25, 4, 29), 64) / 1e9
    assert pruned == pytest.approx(339.60, rel=1e-3)


@pytest.mark.parametrize(
    "rope", [{"rope_parameters": {"rope_type": "longrope"}}, {"rope_scaling": {"type": "longrope"}}]
)
def test_rope_that_needs_one_number_of_heads(rope: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rope scaling 'longrope' is not supported"):
        Architecture.from_config({"model_type": "llama", "num_attention_heads": 4} | rope)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", None])
def test_unsupported_family_names_the_supported(model_type: str | None) -> None:
    with pytest.raises(ValueError, match="is not supported") as caught:
        Architecture.from_config({"model_type": model_type})
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(model_type)) in message
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", None),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("hidden_size", "big"),
        ("vocab_size", [1]),
        ("head_dim", 64.5),
        ("rope_scaling", "dynamic"),
    ],
)
def test_what_is_no_number_is_one_line_with_its_key(key: str, value: object) -> None:
    config = yaml.safe_load((MODELS / "llama-3-8b.yaml").read_text())
    with pytest.raises(ValueError, match=rf"^config\.json: {key.replace('_', '.')}: got ") as error:
        Architecture.from_config(config | {key: value})
    assert "\n" not in str(error.value)


def test_heads_that_form_no_groups_are_refused() -> None:
    config = yaml.safe_load((MODELS / "llama-3-8b.yaml").read_text())
    with pytest.raises(ValueError, match="32 is no multiple of num_key_value_heads 5"):
        Architecture.from_config(config | {"num_key_value_heads": 5})


def test_defaults_of_old_configs() -> None:
    """LLaMA-1 configs name neither KV heads nor head_dim."""
    config = yaml.safe_load((MODELS / "llama-2-7b.yaml").read_text())
    del config["num_key_value_heads"], config["head_dim"]
    assert Architecture.from_config(config) == _architecture("llama-2-7b")
