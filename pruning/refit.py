"""The final sequential refit: every block of the sliced model repairs what upstream lost.

Layer by layer, inputs come from the already pruned and refitted prefix, the target is the dense
model's residual stream: with g the pruned stream before a block, x the input of its output
projection and r the dense stream after the block, (W, b) minimises
E|g + W x + b - r|^2 + lambda |W - W_before|^2.

Shapes: B sequences, T tokens, D hidden size, N input channels of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pruning.families import Family, run_attention, run_mlp
from pruning.statistics import inputs_of

RIDGES = (0.1, 1.0, 10.0)


@dataclass
class CrossMoments:
    """Sums x x', y x' and y y over tokens, x with a constant 1 appended where there is a bias."""

    with_bias: bool
    xx: Tensor | float = 0.0
    yx: Tensor | float = 0.0
    yy: float = 0.0
    count: int = 0

    def add(self, x_BTN: Tensor, y_BTD: Tensor) -> None:
        """Add a micro-batch; products in float32 (float64 inputs stay float64)."""
        wide = torch.float64 if x_BTN.dtype == torch.float64 else torch.float32
        x, y = x_BTN.flatten(0, 1).to(wide), y_BTD.flatten(0, 1).to(wide)
        if self.with_bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx = x.T @ x + self.xx
        self.yx = y.T @ x + self.yx
        self.yy += float(y.square().sum(dtype=torch.float64))
        self.count += len(x)

    def means(self) -> tuple[Tensor, Tensor, float]:
        """Return E[x x'], E[y x'] in float64 and E|y|^2."""
        assert isinstance(self.xx, Tensor)
        assert isinstance(self.yx, Tensor)
        return self.xx.double() / self.count, self.yx.double() / self.count, self.yy / self.count

    def merged(self, other: CrossMoments) -> CrossMoments:
        """Return the moments over the tokens of both."""
        return CrossMoments(
            self.with_bias,
            self.xx + other.xx,
            self.yx + other.yx,
            self.yy + other.yy,
            self.count + other.count,
        )


@torch.no_grad()
def refit(
    pruned: nn.Module,
    dense: nn.Module,
    family: Family,
    tokens_BT: Tensor,
    *,
    batch_size: int = 8,
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, float]]:
    """Refit all output projections of `pruned` in place; return the ridges chosen per layer.

    Each ridge is the one of `RIDGES` (a share of the mean diagonal of E[x x']) with the least
    error on one micro-batch in eight (of fewer, the last) that the fit does not see; the final
    solution uses all.
    """
    device = family.head(dense).device
    batches = [x.to(device) for x in tokens_BT.split(batch_size)]
    target = [family.embed(dense, x) for x in batches]
    stream = [x.clone() for x in target]
    rotary = family.rotary(dense, target[0])
    ridges = []
    layers = zip(family.layers(dense), family.layers(pruned), strict=True)
    for index, (dense_layer, layer) in enumerate(layers):
        after = [run_attention(dense_layer, x, rotary) for x in target]
        target = [run_mlp(dense_layer, x) for x in after]
        attend = partial(run_attention, layer, rotary=rotary)
        inputs = _captured(layer.get_submodule(family.o), attend, stream)
        first = _refit_output(layer.get_submodule(family.o), inputs, stream, after)
        stream = _applied(layer.get_submodule(family.o), inputs, stream)
        inputs = _captured(layer.get_submodule(family.down), partial(run_mlp, layer), stream)
        second = _refit_output(layer.get_submodule(family.down), inputs, stream, target)
        stream = _applied(layer.get_submodule(family.down), inputs, stream)
        ridges.append((first, second))
        on_layer(index)
    return ridges


def _captured(
    linear: nn.Module, run: Callable[[Tensor], Tensor], stream: Sequence[Tensor]
) -> list[Tensor]:
    """Return what enters the output projection `linear` for each micro-batch of the run."""
    inputs: list[Tensor] = []
    with inputs_of(linear, inputs.append):
        for batch in stream:
            run(batch)
    return inputs


def _applied(linear: nn.Module, inputs: Sequence[Tensor], stream: Sequence[Tensor]) -> list[Tensor]:
    """Return the residual stream after the block."""
    return [before + linear(x) for before, x in zip(stream, inputs, strict=True)]


def _refit_output(
    linear: nn.Module, inputs: Sequence[Tensor], stream: Sequence[Tensor], target: Sequence[Tensor]
) -> float:
    """Solve for one output projection, write it back, return the ridge chosen."""
    weight = linear.weight
    bias = linear.bias
    assert isinstance(weight, Tensor)
    fit, held_out = CrossMoments(bias is not None), CrossMoments(bias is not None)
    for index, (x, before, after) in enumerate(zip(inputs, stream, target, strict=True)):
        held = index % 8 == 7 or (len(inputs) < 8 and len(inputs) > 1 and index == len(inputs) - 1)
        (held_out if held else fit).add(x, after - before)
    before_W = weight.double()
    if isinstance(bias, Tensor):
        before_W = torch.cat([before_W, bias.double().unsqueeze(1)], dim=1)
    ridge = _best_ridge(before_W, fit, held_out)
    solution = ridge_towards(before_W, fit.merged(held_out), ridge)
    if isinstance(bias, Tensor):
        bias.copy_(solution[:, -1])
        solution = solution[:, :-1]
    weight.copy_(solution)
    return ridge


def _best_ridge(before_W: Tensor, fit: CrossMoments, held_out: CrossMoments) -> float:
    if held_out.count == 0:
        return RIDGES[1]
    return min(RIDGES, key=lambda ridge: error(ridge_towards(before_W, fit, ridge), held_out))


def ridge_towards(before_W: Tensor, moments: CrossMoments, ridge: float) -> Tensor:
    """Return argmin_W E|W x - y|^2 + lambda |W - before_W|^2 in float64 (D, N [+ 1]).

    lambda = `ridge` times the mean diagonal of E[x x']; the bias column is not damped.
    """
    xx, yx, _ = moments.means()
    num_inputs = xx.shape[0] - moments.with_bias
    damping = ridge * float(xx.diagonal()[:num_inputs].mean())
    system = xx.clone()
    system.diagonal()[:num_inputs] += damping if damping > 0 else ridge
    residual = yx - before_W @ xx
    step = torch.cholesky_solve(residual.T, torch.linalg.cholesky(system)).T
    return before_W + step


def error(weight: Tensor, moments: CrossMoments) -> float:
    """Return E|W x - y|^2 per token, from moments alone."""
    xx, yx, yy = moments.means()
    return float(((weight @ xx) * weight).sum() - 2 * (weight * yx).sum()) + yy
