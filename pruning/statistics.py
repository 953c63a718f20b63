"""Statistics of what enters each output projection: one dense pass, layer by layer.

Shapes: B sequences, T tokens, D hidden size, N input channels of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.families import Family, run_attention, run_mlp


@dataclass(frozen=True)
class BlockStatistics:
    """Moments of the input x of one output projection over `count` calibration tokens.

    `mean` E[x] (N,) and `square` E[x^2] (N,) in float64; `gram` E[x x'] (N, N) in float32, not
    centred; `residual_energy` the median over tokens of |r|^2, r the residual stream that the
    block writes to (the median, because a few tokens carry enormous activations).
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor
    residual_energy: float

    @property
    def variance(self) -> Tensor:
        """Sample variance (N,), float64."""
        spread = (self.square - self.mean.square()).clamp_min(0)
        return spread * (self.count / max(self.count - 1, 1))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the two output projections of one layer."""

    attention: BlockStatistics
    mlp: BlockStatistics


class Moments:
    """Running sums of one projection's inputs and of the residual stream it writes to."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.gram: Tensor | None = None
        self.energies: list[Tensor] = []

    def add(self, x_BTN: Tensor) -> None:
        """Add a micro-batch; products in float32, channel sums in float64."""
        x = x_BTN.reshape(-1, x_BTN.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        self.total = x.sum(0, dtype=torch.float64) + self.total
        self.square = x.square().sum(0, dtype=torch.float64) + self.square
        self.gram = x.T @ x if self.gram is None else self.gram.addmm_(x.T, x)
        self.count += x.shape[0]

    def add_residual(self, r_BTD: Tensor) -> None:
        """Remember the energy of each token of the residual stream."""
        self.energies.append(r_BTD.float().square().sum(-1).flatten())

    def finish(self) -> BlockStatistics:
        """Return the moments per token."""
        assert isinstance(self.total, Tensor)
        assert isinstance(self.square, Tensor)
        assert self.gram is not None
        return BlockStatistics(
            self.count,
            self.total / self.count,
            self.square / self.count,
            self.gram.div_(self.count),
            float(torch.cat(self.energies).median()),
        )


def layer_statistics(
    family: Family, layer: nn.Module, hidden: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
) -> tuple[LayerStatistics, list[Tensor]]:
    """Return the statistics of one dense layer and its outputs, micro-batch by micro-batch.

    `hidden` holds the layer's inputs (B, T, D).
    """
    attention, mlp = Moments(), Moments()
    outputs = []
    with (
        inputs_of(layer.get_submodule(family.o), attention.add),
        inputs_of(layer.get_submodule(family.down), mlp.add),
    ):
        for batch in hidden:
            residual = run_attention(layer, batch, rotary)
            output = run_mlp(layer, residual)
            attention.add_residual(residual)
            mlp.add_residual(output)
            outputs.append(output)
    return LayerStatistics(attention.finish(), mlp.finish()), outputs


@torch.no_grad()
def stream_statistics(
    model: nn.Module,
    family: Family,
    tokens_BT: Tensor,
    batch_size: int,
) -> Iterator[LayerStatistics]:
    """Yield the statistics of each layer of the dense model; one layer's are alive at a time.

    `tokens_BT` are equally long calibration sequences without padding.
    """
    device = family.head(model).device
    hidden = [family.embed(model, x.to(device)) for x in tokens_BT.split(batch_size)]
    rotary = family.rotary(model, hidden[0])
    for layer in family.layers(model):
        statistics, hidden = layer_statistics(family, layer, hidden, rotary)
        yield statistics


@contextmanager
def inputs_of(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand every input of `module` to `receive` while the context lasts."""
    handle = module.register_forward_pre_hook(lambda _, args: receive(args[0]))
    try:
        yield
    finally:
        handle.remove()
