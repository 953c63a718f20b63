"""Model families by roles: the algorithms ask for an attention output, never for an attribute.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.architecture import Architecture

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Family:
    """Adapter of one family: where each role lives in its stock transformers modules.

    `class_prefix` names the stock classes (`{prefix}Config`, `{prefix}ForCausalLM`) and, with
    `Pruned` before it, those of `pruning.modeling_pruned`.
    """

    name: str
    class_prefix: str

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder layers."""
        return model.get_submodule("model.layers")  # type: ignore[return-value]

    def embed(self, model: nn.Module, tokens_BT: Tensor) -> Tensor:
        """Return the input of the first layer (B, T, D)."""
        embedded: Tensor = model.get_submodule("model.embed_tokens")(tokens_BT)
        return embedded

    def final_norm(self, model: nn.Module) -> nn.Module:
        """Return the norm between the last layer and the head."""
        return model.get_submodule("model.norm")

    def head(self, model: nn.Module) -> Tensor:
        """Return the head's weight (vocabulary, D)."""
        weight: Tensor = model.get_submodule("lm_head").weight  # type: ignore[assignment]
        return weight

    def rotary(self, model: nn.Module, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the rotary embedding for positions 0 to T - 1.

        Raises:
            ValueError: the sequences are longer than a sliding attention window, which the
                layer-by-layer forward pass does not model.
        """
        length = hidden_BTD.shape[1]
        check_window(model, length, "data.length")
        positions = torch.arange(length, device=hidden_BTD.device).unsqueeze(0)
        cos, sin = model.get_submodule("model.rotary_emb")(hidden_BTD, position_ids=positions)
        return cos, sin

    # Roles inside one layer, as parameter-name prefixes relative to the layer.
    q = "self_attn.q_proj"
    k = "self_attn.k_proj"
    v = "self_attn.v_proj"
    o = "self_attn.o_proj"
    gate = "mlp.gate_proj"
    up = "mlp.up_proj"
    down = "mlp.down_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        """All linear maps of a layer."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)


class Llama(Family):
    """Llama 1, 2 and 3, Vicuna and every other model of type `llama`."""


class Mistral(Family):
    """Mistral 7B and its kin: Llama with an optional sliding window."""


class Qwen2(Family):
    """Qwen2 and Qwen2.5: biases on q, k and v."""


class Qwen3(Family):
    """Qwen3: RMS norms on each query and key head (untouched by pruning whole heads)."""


FAMILIES: dict[str, Family] = {
    "llama": Llama("llama", "Llama"),
    "mistral": Mistral("mistral", "Mistral"),
    "qwen2": Qwen2("qwen2", "Qwen2"),
    "qwen3": Qwen3("qwen3", "Qwen3"),
}


def window_of(config: Any) -> int | None:
    """Return the tokens of a sliding attention window, None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(window) if slides and window is not None else None


def check_window(model: nn.Module, length: int, name: str) -> None:
    """Refuse sequences that a layer-by-layer forward pass does not model.

    Raises:
        ValueError: they are longer than a sliding attention window; `name` is their setting.
    """
    window = window_of(model.config)
    if window is not None and length > window:
        raise ValueError(
            f"{name}: got {length} tokens, this model attends within a window of {window}; "
            "use at most that many"
        )


def family_of(model: nn.Module) -> tuple[Family, Architecture]:
    """Return the adapter and the architecture of a loaded model.

    Raises:
        ValueError: the family is not supported, or the weights are packed: quantised.
    """
    architecture = Architecture.from_config(model.config.to_dict())  # type: ignore[operator, union-attr]
    family = FAMILIES[architecture.family]
    found = dict(model.get_submodule("model.layers").named_parameters())
    packed = [f"{name} is {x.dtype}" for name, x in found.items() if x.dtype not in _PLAIN]
    for index in range(architecture.layers):
        names = (f"{index}.{role}.weight" for role in family.projections)
        packed += [f"{name} is not there" for name in names if name not in found]
    if packed:
        raise ValueError(
            f"model: its weights are quantised (layer {packed[0]}); "
            "allowed: a checkpoint in float32, bfloat16 or float16"
        )
    return family, architecture


def run_attention(layer: nn.Module, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the residual stream (B, T, D) after the attention block of a stock layer."""
    normed = layer.get_submodule("input_layernorm")(hidden_BTD)
    attended, _ = layer.get_submodule("self_attn")(
        hidden_states=normed, attention_mask=None, position_embeddings=rotary
    )
    output: Tensor = hidden_BTD + attended
    return output


def run_mlp(layer: nn.Module, residual_BTD: Tensor) -> Tensor:
    """Return the residual stream (B, T, D) after the MLP block of a stock layer."""
    normed = layer.get_submodule("post_attention_layernorm")(residual_BTD)
    output: Tensor = residual_BTD + layer.get_submodule("mlp")(normed)
    return output


def run_layer(layer: nn.Module, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the output (B, T, D) of one stock decoder layer on unpadded sequences.

    No mask is passed: scaled-dot-product attention is causal by itself without one.
    """
    return run_mlp(layer, run_attention(layer, hidden_BTD, rotary))
