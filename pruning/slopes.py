"""Slopes: what every other width of every block would add to the loss of a plan, to first order.

A block's output y_k under a cut k is linear in what enters its output projection. With the gradient
g of the loss in that output, going from the plan's own cut to k adds the sum of g' (y_k - y) over
tokens (Taylor; LLM-Pruner, arXiv 2305.11627, ranks units of a dense model so). The corrections of
all prefixes come from one factor, so that one forward and one backward pass of the *pruned* model
tell the slopes towards all levels of all blocks. Layer by layer: a streamed model needs one layer
at a time.

Shapes: B sequences, T tokens, D hidden size, O output channels, N input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pruning.backward import backward
from pruning.elastic import ElasticModel, Run, run_cut_layer
from pruning.elastic_layer import LayerParameters
from pruning.families import Family, run_attention, run_mlp
from pruning.plan import Grid, LayerPlan, Plan
from pruning.reconstruction.correction import OutputGradient
from pruning.spool import Spool, Tensors, held
from pruning.statistics import inputs_of

# `[layer][block][level]`, block 0 attention and 1 MLP.
Slopes = list[tuple[list[float], list[float]]]

# Numbers of a micro-batch's sequences and their final hidden states (B, T, D), before the norm, to
# the gradient of the loss in them.
Gradient = Callable[[range, Tensor], Tensor]


@torch.no_grad()
def stream_slopes(
    elastic: ElasticModel,
    plan: Plan,
    grid: Grid,
    tokens_BT: Tensor,
    gradient: Gradient,
    *,
    batch_size: int = 8,
    spool: Spool | None = None,
) -> Slopes:
    """Return what every level of `grid` would add to the loss of `plan`, 0 at its own levels.

    `tokens_BT` are equally long sequences without padding; `gradient` says what the loss is;
    `spool` takes the inputs of the layers, instead of memory.

    Raises:
        ValueError: a gradient is not finite.
    """
    model, family = elastic.model, elastic.family
    batches = tokens_BT.to(family.head(model).device).split(batch_size)
    hidden = [family.embed(model, x) for x in batches]
    rotary, layers = family.rotary(model, hidden[0]), family.layers(model)
    entering = list[Tensors]()
    for index, (layer, kept) in enumerate(zip(layers, plan.layers, strict=True)):
        keep = held if spool is None else spool.of_layer(index)
        entering.append(keep({str(i): x for i, x in enumerate(hidden)}))
        parameters = elastic.layer_parameters(index, kept)
        hidden = [run_cut_layer(layer, kept, parameters, x, rotary) for x in hidden]
    starts = range(0, len(tokens_BT), batch_size)
    gradients = [
        gradient(range(start, start + len(x)), x) for start, x in zip(starts, hidden, strict=True)
    ]
    found: Slopes = []
    levels = grid.levels(plan)
    for index in reversed(range(len(layers))):
        parameters = elastic.layers[index].padded(plan.layers[index])
        for layer in layers[index : index + 1]:
            back = _Back(layer, family, grid.dense, parameters, rotary)
            before = entering.pop()
            for place, gradient_BTD in enumerate(gradients):
                gradients[place] = back(before[str(place)], gradient_BTD)
        pair = elastic.layers[index].slopes(grid, back.attention.sum, back.mlp.sum)
        found.append(_from(pair, levels[index]))
    return found[::-1]


class _Back:
    """The way back through one layer of a plan; gathers the gradients of both blocks.

    The layer has its dense shape, with zeros for what the plan has removed: what enters its output
    projections are then the inputs of every cut.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        dense: LayerPlan,
        parameters: LayerParameters,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self._layer, self._family, self._rotary = layer, family, rotary
        self._dense, self._parameters = dense, parameters
        self.attention, self.mlp = _Gathered(), _Gathered()

    def __call__(self, before_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
        """Return the gradient (B, T, D) before the layer, given that behind it."""
        entering: dict[str, Tensor] = {}
        o, down = self._family.o, self._family.down
        between, found = backward(
            before_BTD,
            lambda x: self._run(o, run_attention, x, entering),
            lambda x: self._run(down, _run_mlp, x, entering),
            gradient_BTD,
        )
        self.mlp.add(gradient_BTD, entering[down])
        self.attention.add(between, entering[o])
        return found

    def _run(self, role: str, run: Run, hidden_BTD: Tensor, entering: dict[str, Tensor]) -> Tensor:
        """Return the output of a block; what enters its output projection goes to `entering`."""

        def keep(x: Tensor) -> None:
            entering[role] = x.detach()

        with inputs_of(self._layer.get_submodule(role), keep):
            return run_cut_layer(
                self._layer, self._dense, self._parameters, hidden_BTD, self._rotary, run
            )


class _Gathered:
    """The running sum of the gradient of one block."""

    def __init__(self) -> None:
        self.sum = OutputGradient(torch.zeros(()), torch.zeros(()))

    def add(self, gradient_BTO: Tensor, entering_BTN: Tensor) -> None:
        """Add a micro-batch; products in float32."""
        g, x = (y if y.dtype == torch.float64 else y.float() for y in (gradient_BTO, entering_BTN))
        g, x = g.flatten(0, 1), x.flatten(0, 1)
        cross, total = self.sum.cross.to(g), self.sum.total.to(g)
        self.sum = OutputGradient(g.T @ x + cross, g.sum(0) + total)


def _run_mlp(layer: nn.Module, hidden_BTD: Tensor, _: tuple[Tensor, Tensor]) -> Tensor:
    return run_mlp(layer, hidden_BTD)


def _from(
    pair: tuple[list[float], list[float]], levels: tuple[int, int]
) -> tuple[list[float], list[float]]:
    """Return both blocks' values less those of the plan's own levels.

    Raises:
        ValueError: one is not finite.
    """
    if not all(math.isfinite(x) for block in pair for x in block):
        raise ValueError("search: a gradient is not finite; try dtype: float32")
    attention, mlp = ([x - b[at] for x in b] for b, at in zip(pair, levels, strict=True))
    return attention, mlp
