"""A Llama decoder as serving engines run it: merged projections, everything small fused.

The weights are those of stock layers of transformers, laid out once so that q, k and v are rows of
one matrix and gate and up of another; the stock layers go on as views of them. A decode step is
five kernels a layer (`benchmarks/fused_kernels.py`): norm and q, k, v; rotary, cache and attention;
o and residual; norm, gate, up and SiLU; down and residual. Other passes (prefill; everything
without a GPU) use torch's matrix products and attention, on a GPU with what lies between them
compiled.

Shape suffixes: B batch, T tokens, D hidden size, H heads, E head_dim, N rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.fused_kernels import ROWS, attend, linear


class KeyValues(Protocol):
    """What the decoder needs of a KV cache: `update`, and its layers and first free position."""

    start: int
    layers: list[Tensor]

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer and return all of its keys and values."""


class FusedLayer:
    """One decoder layer over the weights of a stock Llama layer, which become views of its own."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.index = index
        self.head_dim: int = attention.head_dim
        self.kv_heads: int = attention.k_proj.out_features // self.head_dim
        self.heads: int = attention.q_proj.out_features // self.head_dim
        self.norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
        self.qkv = _merged(self.norms[0], attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _merged(self.norms[1], mlp.gate_proj, mlp.up_proj)
        self.output: Tensor = attention.o_proj.weight
        self.down: Tensor = mlp.down_proj.weight

    def step(
        self,
        hidden_BD: Tensor,
        sums: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KeyValues,
        arrived: Tensor,
    ) -> None:
        """Add this layer to the residual stream of one new token a row, in place (Triton).

        `sums` of shape (3, rows) are the sums of squares of the residual stream: before this
        layer, which is read, and after attention and MLP, which are zero and are written.
        """
        epsilons = [x.variance_epsilon for x in self.norms]
        qkv = linear(hidden_BD, self.qkv, norm=(sums[0], epsilons[0]))
        attended = attend(qkv, angles, cache.layers[self.index], cache.start, self.heads, arrived)
        linear(attended, self.output, add_to=(hidden_BD, sums[1]))
        activated = linear(hidden_BD, self.gate_up, norm=(sums[1], epsilons[1]), gated=True)
        linear(activated, self.down, add_to=(hidden_BD, sums[2]))

    def forward(
        self,
        hidden_BTD: Tensor,
        delta_BTD: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KeyValues,
        between: Between,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream before the MLP and what the MLP adds to it."""
        hidden, normed = between.add_norm(hidden_BTD, delta_BTD, *_norm(self.norms[0]))
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        heads = functional.linear(normed, self.qkv).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.transpose(1, 2).split(sizes, dim=1)
        query, key = between.rotate(query, *angles), between.rotate(key, *angles)
        keys, values = cache.update(key, value, self.index)
        attended = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=query.shape[2] > 1, enable_gqa=True
        )
        added = functional.linear(attended.transpose(1, 2).flatten(2), self.output)
        hidden, normed = between.add_norm(hidden, added, *_norm(self.norms[1]))
        activated = between.activate(functional.linear(normed, self.gate_up))
        return hidden, functional.linear(activated, self.down)


class Between:
    """What lies between matrix products: plain on a CPU, compiled on a GPU."""

    def __init__(self, device: torch.device) -> None:
        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=True) if device.type == "cuda" else function

        self.add_norm = compiled(_add_norm)
        self.rotate = compiled(_rotate)
        self.activate = compiled(_activate)


class FusedDecoder:
    """The layers of a decoder between its embedding and its head."""

    def __init__(self, layers: Sequence[nn.Module], norm: Any, head: nn.Linear) -> None:
        self.layers = [FusedLayer(layer, index) for index, layer in enumerate(layers)]
        self.norm, self.head = norm, head
        head.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
        self.between = Between(head.weight.device)

    def forward(
        self, hidden_BTD: Tensor, angles: tuple[Tensor, Tensor], caches: Sequence[KeyValues]
    ) -> Tensor:
        """Return the logits of the last position, shape (batch, 1, vocabulary).

        The layers run once per cache. `angles` are cos and sin, shape (1, T, head_dim).
        """
        batch, tokens, _ = hidden_BTD.shape
        if hidden_BTD.is_cuda and tokens == 1 and batch <= ROWS:
            return self._step(hidden_BTD[:, 0], angles, caches)[:, None]
        delta = torch.zeros_like(hidden_BTD)
        for cache in caches:
            for layer in self.layers:
                hidden_BTD, delta = layer.forward(hidden_BTD, delta, angles, cache, self.between)
        _, normed = _add_norm(hidden_BTD[:, -1:], delta[:, -1:], *_norm(self.norm))
        return functional.linear(normed, self.head.weight)

    def _step(
        self, hidden_BD: Tensor, angles: tuple[Tensor, Tensor], caches: Sequence[KeyValues]
    ) -> Tensor:
        """Return the logits of one new token a row, shape (batch, vocabulary)."""
        batch = hidden_BD.shape[0]
        blocks = 2 * len(self.layers) * len(caches)
        sums = hidden_BD.new_zeros(blocks + 1, ROWS, dtype=torch.float32)
        sums[0, :batch] = hidden_BD.float().square().sum(-1)
        most_heads = max(layer.kv_heads for layer in self.layers)
        arrived = hidden_BD.new_zeros(batch * most_heads, dtype=torch.int32)
        runs = [(layer, cache) for cache in caches for layer in self.layers]
        for index, (layer, cache) in enumerate(runs):
            layer.step(hidden_BD, sums[2 * index : 2 * index + 3], angles, cache, arrived)
        return linear(hidden_BD, self.head.weight, norm=(sums[-1], self.norm.variance_epsilon))


def _merged(norm: Any, *projections: Any) -> Tensor:
    """Return the rows of all projections, times the norm's gains, as one matrix.

    The projections go on as views of their rows, the norm with gains of one.
    """
    merged = torch.cat([x.weight for x in projections]).mul_(norm.weight)
    norm.weight.fill_(1.0)
    parts = merged.split([x.out_features for x in projections])
    for projection, rows in zip(projections, parts, strict=True):
        projection.weight = nn.Parameter(rows, requires_grad=False)
    return merged


def _norm(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon


def _add_norm(hidden: Tensor, delta: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    hidden = hidden + delta
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return hidden, gain * (wide * scale).to(hidden.dtype)


def _rotate(heads_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads_BHTE.chunk(2, dim=-1)
    return heads_BHTE * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
