"""Work: what a computation asks of a device, and how long one takes over it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pruning.architecture import Architecture
from selfpruner.costs.hardware import Hardware, Precision

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Work:
    """One kind of work; pieces of work follow one another.

    Attributes:
        flops: floating-point operations, a multiply-add counts two.
        precision: of the operations.
        solves: whether they are factorisations and triangular solves, not products.
        bytes: read from memory.
        layers: decoder layers started one by one.
        offloaded: bytes of weights read from where the device's own memory had no room for them.
        disk: bytes read or written there.
        waiting: seconds that no device shortens.
    """

    flops: float = 0.0
    precision: Precision = "float32"
    solves: bool = False
    bytes: float = 0.0
    layers: float = 0.0
    offloaded: float = 0.0
    disk: float = 0.0
    waiting: float = 0.0

    def seconds(self, hardware: Hardware) -> float:
        """Return the longest of computing, reading memory and starting layers, plus the rest."""
        computing = self.flops / hardware.flops(self.precision, solves=self.solves)
        reading = self.bytes / (1e9 * hardware.bandwidth_gb)
        starting = self.layers * hardware.layer_ms / 1000
        moving = self.offloaded / (1e9 * (hardware.offload_gb or hardware.disk_gb))
        rest = self.disk / (1e9 * hardware.disk_gb) + self.waiting
        return max(computing, reading, starting) + moving + rest


@dataclass(frozen=True)
class Running:
    """A model that runs: dense, or with the share `kept` of what its blocks cost.

    Attributes:
        architecture: of the dense model.
        precision: of its weights.
        kept: share of the blocks' parameters and operations, above 0 to 1.
    """

    architecture: Architecture
    precision: Precision
    kept: float = 1.0

    @property
    def block_bytes(self) -> float:
        """Bytes of the weights of all blocks."""
        return self.kept * self.architecture.block_parameters() * BYTES[self.precision]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights; tied ones count once."""
        return self.block_bytes + self.architecture.fixed_parameters() * BYTES[self.precision]

    def passes(self, tokens: float, length: int, rows: int, *, head: float = 0.0) -> Work:
        """Return forward passes over `tokens` in rows of `length`, `rows` of them at a time.

        `head`: tokens that meet the head. Weights are read once a pass.
        """
        made = math.ceil(tokens / (length * rows))
        model = self.architecture
        dense = model.attention_macs(model.kv_heads, model.q_per_group, length)
        layer = self.kept * (dense + model.mlp_macs(model.mlp, length))
        macs = tokens / length * model.layers * layer + head * model.hidden * model.vocabulary
        return Work(
            flops=2 * macs,
            precision=self.precision,
            bytes=made * self.weight_bytes,
            layers=made * model.layers,
        )

    def steps(self, steps: float, rows: int) -> Work:
        """Return decoding of `steps` tokens one by one in `rows` rows; the cache is left out."""
        model = self.architecture
        macs = self.kept * model.block_parameters() + model.hidden * model.vocabulary
        return Work(
            flops=2 * steps * rows * macs,
            precision=self.precision,
            bytes=steps * self.weight_bytes,
            layers=steps * model.layers,
        )


def times(work: Work, count: float) -> Work:
    """Return the same work `count` times over."""
    return replace(
        work,
        flops=count * work.flops,
        bytes=count * work.bytes,
        layers=count * work.layers,
        offloaded=count * work.offloaded,
        disk=count * work.disk,
        waiting=count * work.waiting,
    )
