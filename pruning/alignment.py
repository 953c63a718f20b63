"""Alignment: the widths that what runs the pruned model is fast at, or can hold at all (no torch).

A kernel works in tiles, so that a model with fewer but odd channels may be no faster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pruning.architecture import Architecture
from pruning.plan import AttentionUnit, Grid, LayerPlan

TARGETS = "cpu, tensor-cores, gguf, or vllm-tpN such as vllm-tp2"
_BLOCK = 32  # numbers that the plain quantisations of llama.cpp share a scale among
_SUPER_BLOCK = 256  # the same of its K-quants


@dataclass(frozen=True)
class Alignment:
    """What one target asks of widths.

    Attributes:
        target: its name.
        step: MLP channels of one step, unless a run says otherwise.
        shards: devices that share every layer: they divide query heads, KV heads and channels.
        quantised: rows of output projections are quantised in blocks.
    """

    target: str
    step: int
    shards: int = 1
    quantised: bool = False

    @classmethod
    def of(cls, target: str) -> Alignment:
        """Return the alignment for `target`.

        Raises:
            ValueError: there is no such target.
        """
        known = {
            "cpu": cls("cpu", 32),
            "tensor-cores": cls("tensor-cores", 128),
            "gguf": cls("gguf", _SUPER_BLOCK, quantised=True),
        }
        if target in known:
            return known[target]
        found = re.fullmatch(r"vllm-tp([1-9][0-9]*)", target)
        if found is None:
            raise ValueError(f"pruning.target: got {target!r}; allowed: {TARGETS}")
        return cls(target, 128 * int(found[1]), shards=int(found[1]))

    def grid(
        self,
        architecture: Architecture,
        step: int | None,
        unit: AttentionUnit = "kv_group",
        prune_attention: bool = True,
    ) -> Grid:
        """Return the grid of widths that suit the target; `step` takes the place of its own.

        Raises:
            ValueError: the dense model or the step does not suit it.
        """
        self._check(architecture, step)
        if unit == "query_head" and prune_attention and architecture.q_per_group == 1:
            raise ValueError(
                "pruning.attention_unit: got query_head, allowed for this model: kv_group; each "
                "KV head has one query head, which cannot go without it"
            )
        grid = Grid.of(architecture, step or self.step, unit, prune_attention)
        block = self._block(architecture)
        levels = [
            level
            for level in range(len(grid.attention))
            if self._suits(grid.layer(level, 0), architecture.head_dim, block)
        ]
        return grid.keeping(levels, range(len(grid.mlp)))

    def _check(self, architecture: Architecture, step: int | None) -> None:
        if step is None and self.step > architecture.mlp:
            raise ValueError(
                f"pruning.target: {self.target} keeps channels in steps of {self.step}, an MLP of "
                f"this model has {architecture.mlp}; set pruning.step"
            )
        unit = _BLOCK if self.quantised else self.shards
        if step is not None and step % unit:
            raise ValueError(
                f"pruning.step: got {step}; allowed with pruning.target {self.target}: "
                f"multiples of {unit}"
            )
        dense = LayerPlan(architecture.kv_heads, architecture.q_per_group, architecture.mlp)
        if architecture.mlp % self.shards or not self._suits(dense, architecture.head_dim, 1):
            raise ValueError(
                f"pruning.target: {self.target} cannot share out {architecture.heads} query heads, "
                f"{architecture.kv_heads} KV heads and {architecture.mlp} channels"
            )

    def _suits(self, layer: LayerPlan, head_dim: int, block: int) -> bool:
        """Return whether the attention of a layer can be shared out and quantised.

        A KV head that is not divided among the shards is copied to several of them.
        """
        heads = layer.kv_groups * layer.q_per_group
        kv_heads = layer.kv_groups
        shared = kv_heads % self.shards == 0 or self.shards % kv_heads == 0
        return shared and heads % self.shards == 0 and heads * head_dim % block == 0

    def _block(self, architecture: Architecture) -> int:
        """Return the largest block that the rows of the dense attention output fill."""
        if not self.quantised:
            return 1
        row = architecture.heads * architecture.head_dim
        return next(block for block in (_SUPER_BLOCK, _BLOCK, 1) if row % block == 0)
