"""The final sequential refit: every block of the sliced model repairs what upstream lost.

Layer by layer, inputs come from the already pruned and refitted prefix, the target is the dense
model's residual stream: with g the pruned stream before a block, x the input of its output
projection, r the dense stream after the block and W_dense the dense columns of the kept channels,
(W, b) minimises
E|g + W x + b - r|^2 + lambda sum over channels j of E[x_j^2] |W_j - W_dense,j|^2.

That is the target `stream`: a block repairs what upstream lost. The target `block` leaves g and
the dense stream before the block out of the difference: W x + b then imitates the dense block's
output, and losses upstream stay (EXPERIMENTS.md: much worse).

The ridge pulls towards the dense columns, not towards those of a correction: those were fitted to
the same tokens once already, and starting from them does worse (EXPERIMENTS.md). So the refit
takes the place of the correction that the search ran under. The weight of a channel makes the
ridge blind to its scale: a few channels are enormous, and one lambda for all would leave them
free or hold the others fast.

Shapes: B sequences, T tokens, D hidden size, N input channels of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pruning.families import Family, run_attention, run_mlp
from pruning.ranking import Order, head_rows
from pruning.statistics import inputs_of, is_held_out

RefitTarget = Literal["stream", "block"]

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
_DEAD = 1e-12  # least weight of a channel in the ridge, as a share of the mean weight


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
    orders: Sequence[Order],
    tokens_BT: Tensor,
    *,
    target: RefitTarget = "stream",
    batch_size: int = 8,
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, float]]:
    """Refit all output projections of `pruned` in place; return the ridges chosen per layer.

    `orders` is the ranking that `pruned` was cut by, one a layer; `target` is what every block
    imitates.

    Each ridge is the one of `RIDGES` with the least error on one micro-batch in eight (of fewer,
    the last) that the fit does not see; the final solution uses all.
    """
    device = family.head(dense).device
    batches = [x.to(device) for x in tokens_BT.split(batch_size)]
    dense_stream = [family.embed(dense, x) for x in batches]
    stream = [x.clone() for x in dense_stream]
    rotary = family.rotary(dense, dense_stream[0])
    ridges = []
    layers = zip(family.layers(dense), family.layers(pruned), orders, strict=True)
    for index, (dense_layer, layer, order) in enumerate(layers):
        o_DN, down_DN = _dense_columns(dense_layer, layer, family, order)
        middle = [run_attention(dense_layer, x, rotary) for x in dense_stream]
        after = [run_mlp(dense_layer, x) for x in middle]
        attend = partial(run_attention, layer, rotary=rotary)
        inputs = _captured(layer.get_submodule(family.o), attend, stream)
        before = stream if target == "stream" else dense_stream
        first = _refit_output(layer.get_submodule(family.o), o_DN, inputs, before, middle)
        stream = _applied(layer.get_submodule(family.o), inputs, stream)
        inputs = _captured(layer.get_submodule(family.down), partial(run_mlp, layer), stream)
        before = stream if target == "stream" else middle
        second = _refit_output(layer.get_submodule(family.down), down_DN, inputs, before, after)
        stream = _applied(layer.get_submodule(family.down), inputs, stream)
        dense_stream = after
        ridges.append((first, second))
        on_layer(index)
    return ridges


def _dense_columns(
    dense_layer: nn.Module, layer: nn.Module, family: Family, order: Order
) -> tuple[Tensor, Tensor]:
    """Return the dense columns of o and down that the cut layer keeps, in its order."""
    dense, cut = dict(dense_layer.named_parameters()), dict(layer.named_parameters())
    o, down = dense[f"{family.o}.weight"], dense[f"{family.down}.weight"]
    queries, keys = len(cut[f"{family.q}.weight"]), len(cut[f"{family.k}.weight"])
    head_dim = o.shape[1] // order.heads.numel()
    heads = order.heads[: keys // head_dim, : queries // keys]
    channels = order.channels[: cut[f"{family.down}.weight"].shape[1]]
    return o[:, head_rows(heads, head_dim)], down[:, channels]


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
    linear: nn.Module,
    dense_DN: Tensor,
    inputs: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> float:
    """Fit an output projection to `after - before`, write it back, return the ridge chosen."""
    weight = linear.weight
    bias = linear.bias
    assert isinstance(weight, Tensor)
    fit, held_out = CrossMoments(bias is not None), CrossMoments(bias is not None)
    for index, (x, start, end) in enumerate(zip(inputs, before, after, strict=True)):
        part = held_out if is_held_out(index, len(inputs)) else fit
        part.add(x, end - start)
    anchor = dense_DN.double()
    if isinstance(bias, Tensor):
        anchor = torch.cat([anchor, bias.double().unsqueeze(1)], dim=1)
    ridge = _best_ridge(anchor, fit, held_out)
    solution = ridge_towards(anchor, fit.merged(held_out), ridge)
    if isinstance(bias, Tensor):
        bias.copy_(solution[:, -1])
        solution = solution[:, :-1]
    weight.copy_(solution)
    return ridge


def _best_ridge(anchor: Tensor, fit: CrossMoments, held_out: CrossMoments) -> float:
    if held_out.count == 0:
        return RIDGES[len(RIDGES) // 2]
    return min(RIDGES, key=lambda ridge: error(ridge_towards(anchor, fit, ridge), held_out))


def ridge_towards(anchor: Tensor, moments: CrossMoments, ridge: float) -> Tensor:
    """Return argmin_W E|W x - y|^2 + ridge sum_j E[x_j^2] |W_j - anchor_j|^2 in float64.

    Shape (D, N [+ 1]); the bias column is not damped.
    """
    xx, yx, _ = moments.means()
    inputs = slice(0, xx.shape[0] - moments.with_bias)
    weights = xx.diagonal()[inputs].clone()
    least = _DEAD * float(weights.mean())
    system = xx.clone()
    system.diagonal()[inputs] += ridge * weights.clamp_min(least if least > 0 else 1.0)
    residual = yx - anchor @ xx
    step = torch.cholesky_solve(residual.T, torch.linalg.cholesky(system)).T
    return anchor + step


def error(weight: Tensor, moments: CrossMoments) -> float:
    """Return E|W x - y|^2 per token, from moments alone."""
    xx, yx, yy = moments.means()
    return float(((weight @ xx) * weight).sum() - 2 * (weight * yx).sum()) + yy
