"""Statistics of what enters each output projection: one dense pass, layer by layer.

Shapes: B sequences, T tokens, D hidden size, N input channels of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pruning.families import Family, run_attention, run_mlp
from pruning.gram import add_products, filled, products


@dataclass(frozen=True)
class BlockStatistics:
    """Moments of the input x of one output projection over `count` calibration tokens.

    `mean` E[x] (N,) and `square` E[x^2] (N,) in float64; `gram` E[x x'] (N, N) in float32, not
    centred; `residual_energy` the median over tokens of |r|^2, r the residual stream that the
    block writes to (the median, because a few tokens carry enormous activations). `held_out` are
    the moments over the held-out part of the same tokens alone, where there is one.
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor
    residual_energy: float
    held_out: BlockStatistics | None = None

    @property
    def variance(self) -> Tensor:
        """Sample variance (N,), float64."""
        spread = (self.square - self.mean.square()).clamp_min(0)
        return spread * (self.count / max(self.count - 1, 1))

    @property
    def fit(self) -> BlockStatistics:
        """Moments over the tokens that are not held out (`residual_energy` stays that of all)."""
        if self.held_out is None:
            return self
        count = self.count - self.held_out.count
        whole, part = self.count / count, self.held_out.count / count
        return BlockStatistics(
            count,
            whole * self.mean - part * self.held_out.mean,
            whole * self.square - part * self.held_out.square,
            whole * self.gram - part * self.held_out.gram,
            self.residual_energy,
        )


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the two output projections of one layer, and of what enters its blocks.

    `entry_squares` are E[x^2] (D,) in float64 of what enters q, k, v and of what enters gate, up.
    """

    attention: BlockStatistics
    mlp: BlockStatistics
    entry_squares: tuple[Tensor, Tensor]


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
        self.gram = products(x) if self.gram is None else add_products(self.gram, x)
        self.count += x.shape[0]

    def add_residual(self, r_BTD: Tensor) -> None:
        """Remember the energy of each token of the residual stream."""
        self.energies.append(r_BTD.float().square().sum(-1).flatten())

    def merged(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both, which stay as they are."""
        assert self.gram is not None
        assert other.gram is not None
        both = Moments()
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.square = self.square + other.square
        both.gram = self.gram + other.gram
        both.energies = self.energies + other.energies
        return both

    def finish(self) -> BlockStatistics:
        """Return the moments per token; the sums stay as they are.

        Raises:
            ValueError: an activation was not finite.
        """
        assert isinstance(self.total, Tensor)
        assert isinstance(self.square, Tensor)
        assert self.gram is not None
        if not bool(self.square.isfinite().all()):
            raise ValueError("calibration: the activations are not finite; try dtype: float32")
        return BlockStatistics(
            self.count,
            self.total / self.count,
            self.square / self.count,
            filled(self.gram / self.count),
            float(torch.cat(self.energies).median()),
        )


class LayerMoments:
    """Running sums of one layer: each output projection's, held-out tokens apart."""

    def __init__(self) -> None:
        self.attention, self.mlp = (Moments(), Moments()), (Moments(), Moments())
        self.entries: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    @property
    def count(self) -> int:
        """Tokens so far, held-out ones included."""
        return sum(part.count for part in self.attention)

    def add(
        self, inputs: Sequence[Tensor], residuals: tuple[Tensor, Tensor], held_out: bool
    ) -> None:
        """Add a micro-batch: what enters q, o, gate and down, and the stream after each block."""
        q_BTD, o_BTN, gate_BTD, down_BTN = inputs
        for parts, x, residual in (
            (self.attention, o_BTN, residuals[0]),
            (self.mlp, down_BTN, residuals[1]),
        ):
            parts[held_out].add(x)
            parts[held_out].add_residual(residual)
        attention, mlp = self.entries
        self.entries = (_squares(q_BTD) + attention, _squares(gate_BTD) + mlp)

    def finish(self) -> LayerStatistics:
        """Return the moments per token; the sums stay as they are."""
        attention, mlp = (
            fit.finish()
            if not held_out.count
            else replace(fit.merged(held_out).finish(), held_out=held_out.finish())
            for fit, held_out in (self.attention, self.mlp)
        )
        entries = tuple(x / attention.count for x in self.entries if isinstance(x, Tensor))
        assert len(entries) == 2
        return LayerStatistics(attention, mlp, entries)


def layer_statistics(
    family: Family,
    layer: nn.Module,
    hidden: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    hold_out: bool = False,
) -> tuple[LayerStatistics, list[Tensor]]:
    """Return the statistics of one dense layer and its outputs, micro-batch by micro-batch.

    `hidden` holds the layer's inputs (B, T, D); `hold_out` keeps the moments of some apart, too.
    """
    moments = LayerMoments()
    held_out = [hold_out and is_held_out(index, len(hidden)) for index in range(len(hidden))]
    outputs = add_layer(moments, family, layer, hidden, rotary, held_out)
    return moments.finish(), outputs


def add_layer(
    moments: LayerMoments,
    family: Family,
    layer: nn.Module,
    hidden: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    held_out: Sequence[bool],
) -> list[Tensor]:
    """Run a dense layer, add to its moments and return its outputs, one a micro-batch.

    `held_out` says for each micro-batch (B, T, D) of `hidden` which moments it belongs to.
    """
    outputs, inputs = [], list[Tensor]()
    with ExitStack() as stack:
        for role in (family.q, family.o, family.gate, family.down):
            stack.enter_context(inputs_of(layer.get_submodule(role), inputs.append))
        for batch, is_apart in zip(hidden, held_out, strict=True):
            residual = run_attention(layer, batch, rotary)
            output = run_mlp(layer, residual)
            moments.add(inputs, (residual, output), is_apart)
            inputs.clear()
            outputs.append(output)
    return outputs


def is_held_out(index: int, count: int) -> bool:
    """Return whether micro-batch `index` of `count` is held out: one in eight, of fewer the last.

    A single one is not: there would be nothing left to fit to.
    """
    return index % 8 == 7 or (1 < count < 8 and index == count - 1)


@torch.no_grad()
def stream_statistics(
    model: nn.Module,
    family: Family,
    tokens_BT: Tensor,
    batch_size: int,
    hold_out: bool = False,
) -> Iterator[LayerStatistics]:
    """Yield the statistics of each layer of the dense model; one layer's are alive at a time.

    `tokens_BT` are equally long calibration sequences without padding.
    """
    device = family.head(model).device
    hidden = [family.embed(model, x.to(device)) for x in tokens_BT.split(batch_size)]
    rotary = family.rotary(model, hidden[0])
    for layer in family.layers(model):
        statistics, hidden = layer_statistics(family, layer, hidden, rotary, hold_out)
        yield statistics


@contextmanager
def inputs_of(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand every input of `module` to `receive` while the context lasts."""
    handle = module.register_forward_pre_hook(lambda _, args: receive(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _squares(x_BTD: Tensor) -> Tensor:
    """Return the sum over tokens of x^2 (D,), float64."""
    x = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
    return x.square().sum((0, 1), dtype=torch.float64)
