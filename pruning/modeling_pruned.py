"""LLaMA-like decoders whose layers differ in width: `config.per_layer_config` says what each keeps.

This file travels with every exported model and needs nothing but transformers (5.14 or newer)
and torch. Each decoder layer is the stock one of its family, built from its own resolved
configuration; all layers keep the family's weight names. Layers dispatch attention through
`ALL_ATTENTION_FUNCTIONS.get_interface(...)`, as the stock ones do, so that serving engines which
look for it can bind their own kernels.

`correction_biases` adds a bias to every output projection (o_proj, down_proj): the mean that the
removed units used to contribute.
"""

import copy

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class PerLayerConfig:
    """What the pruned configurations share: a switch, and a check that each layer is sound."""

    correction_biases: bool = False

    def validate_architecture(self):
        """Refuse query heads that do not form KV groups; head_dim is explicit, so no more."""
        layers = list(self.per_layer_config) if self.is_heterogeneous else [self]
        for index, layer in enumerate(layers):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: {layer.num_attention_heads} query heads are no multiple of "
                    f"{layer.num_key_value_heads} KV heads"
                )


def _without_layers(config):
    """Return a copy with no layers, all alike: stock constructors must not read their widths."""
    shell = copy.copy(config)
    shell.num_hidden_layers = 0
    shell.per_layer_config = None  # scaled rotary embeddings read how many heads there are
    return shell


class PerLayerModel:
    """A trunk that builds each stock layer of its family from its own resolved configuration."""

    layer_class: type

    def __init__(self, config):
        shell = _without_layers(config)
        super().__init__(shell)
        config._attn_implementation = shell._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(self._layer(i) for i in range(config.num_hidden_layers))
        self.post_init()

    def _layer(self, index):
        per_layer = self.config.is_heterogeneous
        config = self.config.per_layer_config[index] if per_layer else self.config
        layer = self.layer_class(config, index)
        # Attention reads its kernel's name from the configuration at every call: share the
        # model's, so that a later change of kernel reaches every layer.
        layer.self_attn.config = self.config
        if self.config.correction_biases:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                if linear.bias is None:
                    linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        return layer


class PerLayerForCausalLM:
    """A language-model head on such a trunk."""

    model_class: type

    def __init__(self, config):
        super().__init__(_without_layers(config))
        self.config = config
        self.model = self.model_class(config)
        self.post_init()


@strict
class PrunedLlamaConfig(PerLayerConfig, LlamaConfig):
    """Llama with per-layer widths."""

    model_type = "pruned_llama"
    correction_biases: bool = False


class PrunedLlamaModel(PerLayerModel, LlamaModel):
    """Llama trunk with per-layer widths."""

    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(PerLayerForCausalLM, LlamaForCausalLM):
    """Llama with per-layer widths and a language-model head."""

    config_class = PrunedLlamaConfig
    model_class = PrunedLlamaModel


@strict
class PrunedMistralConfig(PerLayerConfig, MistralConfig):
    """Mistral with per-layer widths."""

    model_type = "pruned_mistral"
    correction_biases: bool = False


class PrunedMistralModel(PerLayerModel, MistralModel):
    """Mistral trunk with per-layer widths."""

    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(PerLayerForCausalLM, MistralForCausalLM):
    """Mistral with per-layer widths and a language-model head."""

    config_class = PrunedMistralConfig
    model_class = PrunedMistralModel


@strict
class PrunedQwen2Config(PerLayerConfig, Qwen2Config):
    """Qwen2 with per-layer widths."""

    model_type = "pruned_qwen2"
    correction_biases: bool = False


class PrunedQwen2Model(PerLayerModel, Qwen2Model):
    """Qwen2 trunk with per-layer widths."""

    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PerLayerForCausalLM, Qwen2ForCausalLM):
    """Qwen2 with per-layer widths and a language-model head."""

    config_class = PrunedQwen2Config
    model_class = PrunedQwen2Model


@strict
class PrunedQwen3Config(PerLayerConfig, Qwen3Config):
    """Qwen3 with per-layer widths."""

    model_type = "pruned_qwen3"
    correction_biases: bool = False


class PrunedQwen3Model(PerLayerModel, Qwen3Model):
    """Qwen3 trunk with per-layer widths."""

    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PerLayerForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with per-layer widths and a language-model head."""

    config_class = PrunedQwen3Config
    model_class = PrunedQwen3Model
