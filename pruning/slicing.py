"""Slicing: the physically smaller model that a plan describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruning import modeling_pruned
from pruning.elastic import ElasticModel, Prunable
from pruning.families import Family
from pruning.plan import LayerPlan, Plan
from pruning.streaming import LayerWriter, streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a configuration carries about where it came from, not about the network.
_PROVENANCE = ("architectures", "auto_map", "model_type", "quantization_config", "_name_or_path")


@dataclass(frozen=True)
class Blueprint:
    """What a plan makes of a dense model, before any weight.

    Attributes:
        model_class: stock where the family can express the plan, else of `modeling_pruned`.
        config: with the widths of the plan.
        bare_roles: linears that the class gives a bias though the plan has none: zeros.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    bare_roles: tuple[str, ...] = ()

    @classmethod
    def of(cls, prunable: Prunable, plan: Plan, first: Mapping[str, Tensor]) -> Blueprint:
        """Return the blueprint of a plan under which the first layer has the parameters `first`."""
        family = prunable.family
        dense: PreTrainedModel = prunable.model
        has_biases = all(f"{role}.bias" in first for role in (family.o, family.down))
        return _stock(family, dense, plan, has_biases) or cls(
            per_layer_class(family), per_layer_config(family, dense.config, plan, has_biases)
        )

    def layer(self, index: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of one layer, named as in the model."""
        zeros = {
            f"{role}.bias": parameters[f"{role}.weight"].new_zeros(
                parameters[f"{role}.weight"].shape[0]
            )
            for role in self.bare_roles
            if f"{role}.bias" not in parameters
        }
        own = {**parameters, **zeros}
        return {f"model.layers.{index}.{name}": x for name, x in own.items()}


@torch.no_grad()
def sliced(prunable: Prunable, plan: Plan) -> PreTrainedModel:
    """Return a new model whose weights are what `plan` keeps, in the dtype of the dense one.

    A plan that is uniform across layers becomes the stock architecture where that can hold its
    heads and the correction biases, any other a `pruning.modeling_pruned` class. Weights are
    copies.
    """
    parameters = prunable.parameters(plan)
    dense: PreTrainedModel = prunable.model
    blueprint = Blueprint.of(prunable, plan, parameters[0])
    state = _outer_state(dense)
    for index, layer in enumerate(parameters):
        state |= blueprint.layer(index, layer)
    built = _built(blueprint, state)
    built.generation_config = dense.generation_config
    built.set_attn_implementation(dense.config._attn_implementation)
    return built.to(dense.device).eval()


@torch.no_grad()
def sliced_on_disk(elastic: ElasticModel, plan: Plan, folder: Path) -> PreTrainedModel:
    """Return what `sliced` does, streamed from `folder`, where it is written layer by layer.

    Raises:
        OSError: the folder cannot be written.
    """
    dense: PreTrainedModel = elastic.model
    blueprint = Blueprint.of(elastic, plan, elastic.layer_parameters(0, plan.layers[0]))
    writer = LayerWriter(dense, folder)
    for index, layer in enumerate(plan.layers):
        writer.add(blueprint.layer(index, elastic.layer_parameters(index, layer)))
        elastic.forget()
    writer.close()
    built = streamed_model(
        blueprint.model_class, blueprint.config, folder, dense.dtype, dense.device
    )
    built.generation_config = dense.generation_config
    return built


def layer_plan(model: PreTrainedModel) -> Plan:
    """Return what each layer of a sliced or dense model keeps, read off its weights."""
    layers = []
    for layer in model.get_submodule("model.layers").children():
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        head_dim = int(attention.head_dim)
        kv_groups = attention.get_submodule("k_proj").out_features // head_dim
        heads = attention.get_submodule("q_proj").out_features // head_dim
        channels = mlp.get_submodule("down_proj").in_features
        layers.append(LayerPlan(int(kv_groups), int(heads // kv_groups), int(channels)))
    return Plan(tuple(layers))


def _outer_state(dense: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights outside the layers: embedding, final norm, head."""
    return {k: v for k, v in dense.state_dict().items() if not k.startswith("model.layers.")}


def _widths(layer: LayerPlan) -> dict[str, int]:
    return {
        "num_attention_heads": layer.kv_groups * layer.q_per_group,
        "num_key_value_heads": layer.kv_groups,
        "intermediate_size": layer.mlp_channels,
    }


def _heads_width(fields: Mapping[str, Any]) -> int:
    """Return how wide all query heads are together."""
    return int(fields["num_attention_heads"]) * int(fields["head_dim"])


def _plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the dense configuration's fields with an explicit head_dim."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _PROVENANCE}
    fields["head_dim"] = fields.get("head_dim") or (
        config.hidden_size // config.num_attention_heads
    )
    return fields


def per_layer_class(family: Family) -> type[PreTrainedModel]:
    """Return the class of `pruning.modeling_pruned` for a family."""
    found: type[PreTrainedModel] = getattr(
        modeling_pruned, f"Pruned{family.class_prefix}ForCausalLM"
    )
    return found


def per_layer_config(
    family: Family, config: PreTrainedConfig, plan: Plan, has_biases: bool
) -> PreTrainedConfig:
    """Return the configuration of such a class with the widths of `plan`."""
    config_class = getattr(modeling_pruned, f"Pruned{family.class_prefix}Config")
    layers = {index: _widths(layer) for index, layer in enumerate(plan.layers)}
    widest = {key: max(w[key] for w in layers.values()) for key in layers[0]}
    fields = _plain_config(config) | widest
    made: PreTrainedConfig = config_class(
        **fields, correction_biases=has_biases, per_layer_config=layers
    )
    return made


def _stock(
    family: Family, dense: PreTrainedModel, plan: Plan, has_biases: bool
) -> Blueprint | None:
    """Return the stock model of a uniform plan, or None where it cannot be expressed.

    Llama holds biases on o and down only together with biases on q, k, v, gate and up: those
    are zero. The other families have no bias on down. vLLM's own Qwen2 takes the width of a head
    from the hidden size, so that all heads together have to be as wide.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassClassValidationError

    if not plan.is_uniform or (has_biases and family.name != "llama"):
        return None
    fields = _plain_config(dense.config) | _widths(plan.layers[0])
    if family.name == "qwen2" and _heads_width(fields) != fields["hidden_size"]:
        return None
    bare = (family.q, family.k, family.v, family.gate, family.up) if has_biases else ()
    if has_biases:
        fields |= {"attention_bias": True, "mlp_bias": True}
    try:
        config = getattr(transformers, f"{family.class_prefix}Config")(**fields)
    except (ValueError, StrictDataclassClassValidationError):
        return None  # stock configurations refuse heads that do not divide the hidden size
    return Blueprint(getattr(transformers, f"{family.class_prefix}ForCausalLM"), config, bare)


def _built(blueprint: Blueprint, state: dict[str, Tensor]) -> PreTrainedModel:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = blueprint.model_class(blueprint.config)
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    model.load_state_dict(copies, assign=True)
    model.tie_weights()
    return model
