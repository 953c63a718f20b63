"""What stock llama.cpp can run: its graphs of LLaMA-like decoders and what each can hold.

llama.cpp builds a model by the name of the architecture in its file. Those of the families here
read one width for all layers; `deci` (made for NVIDIA's Nemotron models, which differ from layer
to layer) is LLaMA with a width for each, and with room for a bias on every projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.families import window_of
from pruning.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Roles in a decoder layer of transformers and their names in a GGUF file.
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


@dataclass(frozen=True)
class LayerWidths:
    """Sizes of one layer."""

    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Shape:
    """What a graph must hold to run a model.

    `biases` are the projections (keys of `PROJECTIONS`) that have one in some layer; `head_norms`
    norms on queries and keys; `frequency_factors` one for each rotary frequency (Llama 3).
    """

    family: str
    hidden: int
    head_dim: int
    layers: tuple[LayerWidths, ...]
    biases: frozenset[str]
    head_norms: bool
    frequency_factors: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, weights: Shards) -> Shape:
        """Return the shape of a model: widths and biases are read off its weights.

        Raises:
            ValueError: a weight is missing, or the configuration asks for what no graph computes.
        """
        family = str(config.model_type).removeprefix("pruned_")
        _check(config, family)
        head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        prefixes = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]
        return cls(
            family=family,
            hidden=int(config.hidden_size),
            head_dim=head_dim,
            layers=tuple(_widths(weights, prefix, head_dim) for prefix in prefixes),
            biases=frozenset(
                role
                for role in PROJECTIONS
                if any(f"{prefix}.{role}.bias" in weights for prefix in prefixes)
            ),
            head_norms=any(
                f"{prefix}.{role}.weight" in weights for prefix in prefixes for role in HEAD_NORMS
            ),
            frequency_factors=config.rope_parameters["rope_type"] == "llama3",
        )


def _widths(weights: Shards, prefix: str, head_dim: int) -> LayerWidths:
    return LayerWidths(
        heads=weights.shape(f"{prefix}.self_attn.q_proj.weight")[0] // head_dim,
        kv_heads=weights.shape(f"{prefix}.self_attn.k_proj.weight")[0] // head_dim,
        mlp=weights.shape(f"{prefix}.mlp.down_proj.weight")[1],
    )


def _check(config: PreTrainedConfig, family: str) -> None:
    """Refuse what llama.cpp would compute otherwise without a word.

    Raises:
        ValueError: with the reason.
    """
    if family not in _STOCK:
        raise ValueError(
            f"config.json: model_type {config.model_type!r} is not supported in GGUF; "
            f"supported families: {', '.join(_STOCK)}"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"config.json: hidden_act {config.hidden_act!r}; llama.cpp computes {family} with silu"
        )
    window = window_of(config)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"config.json: sliding_window {window}; llama.cpp's {_STOCK[family].name} has none"
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"config.json: rope_type {rope['rope_type']!r} is not supported in GGUF; "
            "supported: default, linear, llama3"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor below 1 is not supported in GGUF")


@dataclass(frozen=True)
class Graph:
    """One architecture of llama.cpp, as far as these families need it.

    `interleaved`: rotary pairs are neighbours (2i, 2i + 1), not halves (i, i + d/2).
    `any_heads`: the query heads together need not be as wide as the hidden state.
    """

    name: str
    interleaved: bool
    biases: frozenset[str]
    widths_per_layer: bool = False
    any_heads: bool = True
    head_norms: bool = False
    frequency_factors: bool = False

    def lacks(self, shape: Shape) -> str | None:
        """Return what of a model the graph cannot hold, in a few words, or None."""
        if len(set(shape.layers)) > 1 and not self.widths_per_layer:
            return "layers of different widths"
        narrow = any(x.heads * shape.head_dim != shape.hidden for x in shape.layers)
        if narrow and not self.any_heads:
            return "query heads narrower than the hidden state"
        if shape.head_norms and not self.head_norms:
            return "norms on queries and keys"
        if homeless := shape.biases - self.biases:
            return "bias on " + ", ".join(sorted(role.partition(".")[2] for role in homeless))
        if shape.frequency_factors and not self.frequency_factors:
            return "rotary scaling of Llama 3"
        return None


_EVERYWHERE = frozenset(PROJECTIONS)
_QKV = frozenset(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_LLAMA = Graph("llama", True, _EVERYWHERE, frequency_factors=True)
_QWEN2 = Graph("qwen2", False, _QKV, any_heads=False)
_QWEN3 = Graph("qwen3", False, frozenset(), head_norms=True)
_DECI = Graph("deci", True, _EVERYWHERE, widths_per_layer=True, frequency_factors=True)

_STOCK = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}


def graph_for(shape: Shape) -> Graph:
    """Return the family's own graph where it holds the model, else `deci`.

    Raises:
        ValueError: neither does; one line with the reasons.
    """
    reasons = []
    for graph in (_STOCK[shape.family], _DECI):
        lacking = graph.lacks(shape)
        if lacking is None:
            return graph
        reasons.append(f"{graph.name} has no {lacking}")
    raise ValueError(
        f"config.json: no architecture of llama.cpp holds this {shape.family} model: "
        + ", ".join(reasons)
    )
