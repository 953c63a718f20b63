"""The integers of a decoder: what its blocks cost, from the config alone (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning.plan import LayerPlan, Plan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """Sizes of one decoder-only transformer, per layer all equal (the dense model).

    `qkv_bias` biases on q, k and v; `output_bias` a bias on o; `mlp_bias` biases on gate, up
    and down; `qk_norm` RMS norms of size `head_dim` on queries and keys.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Return the architecture that a Hugging Face `config.json` (as a mapping) describes.

        Raises:
            KeyError: a number is missing.
            ValueError: the family is not one of `FAMILIES`, what should be a number is none, heads
                do not form KV groups, or rope scaling is of a kind that layers of different widths
                cannot have.
        """
        family = str(config.get("model_type"))
        if family not in FAMILIES:
            raise ValueError(
                f"config.json: model_type {family!r} is not supported; "
                f"supported families: {', '.join(FAMILIES)}"
            )
        heads = _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json: rope scaling: got {rope!r:.60}, want a mapping")
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            raise ValueError(
                "config.json: rope scaling 'longrope' is not supported: transformers reads "
                "numbers of heads there, which differ by layer"
            )
        has_bias_switch = family in ("llama", "qwen3")
        attention_bias = bool(config.get("attention_bias", False)) and has_bias_switch
        hidden = _count(config, "hidden_size")
        return cls(
            family=family,
            layers=_count(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_count(config, "head_dim", hidden // heads),
            mlp=_count(config, "intermediate_size"),
            vocabulary=_count(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
        )

    @property
    def q_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def attention_parameters(self, kv_groups: int, q_per_group: int) -> int:
        """Return the prunable attention parameters (q, k, v, o and QKV biases) of one layer."""
        q_dim = kv_groups * q_per_group * self.head_dim
        kv_dim = kv_groups * self.head_dim
        weights = self.hidden * (2 * q_dim + 2 * kv_dim)
        return weights + (q_dim + 2 * kv_dim if self.qkv_bias else 0)

    def kv_numbers(self, kv_groups: int) -> int:
        """Return how many numbers one token leaves in the KV cache of one layer."""
        return 2 * kv_groups * self.head_dim

    def mlp_parameters(self, channels: int) -> int:
        """Return the prunable MLP parameters (gate, up, down) of one layer."""
        return channels * (3 * self.hidden + (2 if self.mlp_bias else 0))

    def layer_parameters(self, layer: LayerPlan) -> int:
        """Return the prunable parameters of one layer that keeps what `layer` says."""
        attention = self.attention_parameters(layer.kv_groups, layer.q_per_group)
        return attention + self.mlp_parameters(layer.mlp_channels)

    def block_parameters(self, plan: Plan | None = None) -> int:
        """Return the prunable parameters of all layers, dense or under `plan`."""
        if plan is None:
            dense = self.attention_parameters(self.kv_heads, self.q_per_group)
            return self.layers * (dense + self.mlp_parameters(self.mlp))
        return sum(self.layer_parameters(layer) for layer in plan.layers)

    def fixed_parameters(self, correction_biases: bool = False) -> int:
        """Return what is never pruned: norms, embedding, head, output biases.

        `correction_biases`: also count one bias on every o and down projection that the dense
        model does not have.
        """
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        output_biases = (self.output_bias or correction_biases) + (
            self.mlp_bias or correction_biases
        )
        return embeddings + self.hidden + self.layers * (norms + output_biases * self.hidden)

    def total_parameters(self, plan: Plan | None = None, correction_biases: bool = False) -> int:
        """Return all parameters of the model, dense or under `plan`; tied weights count once."""
        return self.block_parameters(plan) + self.fixed_parameters(correction_biases)

    def attention_macs(self, kv_groups: int, q_per_group: int, tokens: int) -> int:
        """Return multiply-accumulates of one attention block for one sequence of `tokens`."""
        q_dim = kv_groups * q_per_group * self.head_dim
        linear = tokens * self.hidden * (2 * q_dim + 2 * kv_groups * self.head_dim)
        return linear + 2 * q_dim * tokens * tokens

    def mlp_macs(self, channels: int, tokens: int) -> int:
        """Return multiply-accumulates of one MLP for one sequence of `tokens`."""
        return tokens * 3 * self.hidden * channels

    def total_macs(self, plan: Plan, tokens: int) -> int:
        """Return multiply-accumulates of a forward pass over `tokens`, head included.

        Attention counts the full square of scores and of the weighted sum (no causal saving),
        as the LLM-Pruner table does; norms, softmax and activations are left out.
        """
        layers = sum(
            self.attention_macs(layer.kv_groups, layer.q_per_group, tokens)
            + self.mlp_macs(layer.mlp_channels, tokens)
            for layer in plan.layers
        )
        return layers + tokens * self.hidden * self.vocabulary


def _count(config: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    """Return a whole number from 1; `otherwise` where there is none.

    Raises:
        KeyError: it is missing.
        ValueError: it is none.
    """
    value = config[key] if otherwise is None else config.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key}: got {value!r:.60}, want a whole number from 1")
    return value
