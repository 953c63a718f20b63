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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pruning.families import Family, run_attention, run_mlp
from pruning.gram import filled, products
from pruning.ranking import Order, head_rows
from pruning.statistics import inputs_of, is_held_out

RefitTarget = Literal["stream", "block"]
Means = tuple[Tensor, Tensor, float]

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
_DEAD = 1e-12  # least weight of a channel in the ridge, as a share of the mean weight


@dataclass
class CrossMoments:
    """Sums x x', y x' and y y over tokens, x with a constant 1 appended where there is a bias.

    Of `xx` what `gram.filled` fills is still missing.
    """

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
        self.xx = products(x) + self.xx
        self.yx = y.T @ x + self.yx
        self.yy += float(y.square().sum(dtype=torch.float64))
        self.count += len(x)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        sums = (torch.as_tensor(x) for x in (self.xx, self.yx, self.yy))
        return all(bool(x.isfinite().all()) for x in sums)

    def means(self) -> Means:
        """Return E[x x'], E[y x'] in float64 and E|y|^2."""
        assert isinstance(self.xx, Tensor)
        assert isinstance(self.yx, Tensor)
        xx = filled(self.xx.double() / self.count)
        return xx, self.yx.double() / self.count, self.yy / self.count

    def merged(self, other: CrossMoments) -> CrossMoments:
        """Return the moments over the tokens of both."""
        return CrossMoments(
            self.with_bias,
            self.xx + other.xx,
            self.yx + other.yx,
            self.yy + other.yy,
            self.count + other.count,
        )


class _Prefix:
    """A pruned model, refitted as far as it has come, and its residual stream there."""

    def __init__(
        self, model: nn.Module, family: Family, orders: Sequence[Order], embedded: Sequence[Tensor]
    ) -> None:
        self.ridges: list[tuple[float, float]] = []
        self._family, self._orders = family, orders
        self._layers = iter(family.layers(model))
        self._stream = list(embedded)

    def refit_layer(
        self,
        dense_layer: nn.Module,
        rotary: tuple[Tensor, Tensor],
        dense_stream: Sequence[Tensor],
        middle: Sequence[Tensor],
        after: Sequence[Tensor],
        target: RefitTarget,
    ) -> nn.Module:
        """Refit the next layer and return it; the dense stream is that around its blocks."""
        index, family = len(self.ridges), self._family
        layer = next(self._layers)
        o_DN, down_DN = _dense_columns(dense_layer, layer, family, self._orders[index])
        attend = partial(run_attention, layer, rotary=rotary)
        first = self._refit_block(
            layer.get_submodule(family.o), attend, o_DN, dense_stream, middle, target
        )
        second = self._refit_block(
            layer.get_submodule(family.down),
            partial(run_mlp, layer),
            down_DN,
            middle,
            after,
            target,
        )
        self.ridges.append((first, second))
        return layer

    def _refit_block(
        self,
        linear: nn.Module,
        run: Callable[[Tensor], Tensor],
        dense_DN: Tensor,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        target: RefitTarget,
    ) -> float:
        """Refit one output projection, go on to the stream after its block, return the ridge."""
        inputs = _captured(linear, run, self._stream)
        start = self._stream if target == "stream" else before
        ridge = _refit_output(linear, dense_DN, inputs, start, after)
        self._stream = _applied(linear, inputs, self._stream)
        return ridge


@torch.no_grad()
def refit(
    pruned: Sequence[nn.Module],
    dense: nn.Module,
    family: Family,
    orders: Sequence[Sequence[Order]],
    tokens_BT: Tensor,
    *,
    target: RefitTarget = "stream",
    batch_size: int = 8,
    keep: Callable[[int, int, nn.Module], None] = lambda _model, _index, _layer: None,
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[list[tuple[float, float]]]:
    """Refit all output projections of the `pruned` models in place, in one pass over `dense`.

    `orders` are the rankings that each of them was cut by, one a layer; `target` is what every
    block imitates. `keep(model, index, layer)` is shown every layer once it is refitted: of a
    streamed model nothing else remains of it. Returns for each model the ridges chosen, one pair
    a layer.

    Each ridge is the one of `RIDGES` with the least error on one micro-batch in eight (of fewer,
    the last) that the fit does not see; the final solution uses all.
    """
    device = family.head(dense).device
    dense_stream = [family.embed(dense, x.to(device)) for x in tokens_BT.split(batch_size)]
    rotary = family.rotary(dense, dense_stream[0])
    prefixes = [
        _Prefix(model, family, order, dense_stream)
        for model, order in zip(pruned, orders, strict=True)
    ]
    for index, layer in enumerate(family.layers(dense)):
        middle = [run_attention(layer, x, rotary) for x in dense_stream]
        after = [run_mlp(layer, x) for x in middle]
        for number, prefix in enumerate(prefixes):
            refitted = prefix.refit_layer(layer, rotary, dense_stream, middle, after, target)
            keep(number, index, refitted)
        dense_stream = after
        on_layer(index)
    return [prefix.ridges for prefix in prefixes]


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
    """Fit an output projection to `after - before`, write it back, return the ridge chosen.

    Where the model overflows, the projection stays as it is, at an infinite ridge: whoever compares
    the models sees which one is sound.
    """
    weight = linear.weight
    bias = linear.bias
    assert isinstance(weight, Tensor)
    fit, held_out = CrossMoments(bias is not None), CrossMoments(bias is not None)
    for index, (x, start, end) in enumerate(zip(inputs, before, after, strict=True)):
        part = held_out if is_held_out(index, len(inputs)) else fit
        part.add(x, end - start)
    if not (fit.is_finite and held_out.is_finite):
        return math.inf
    anchor = dense_DN.double()
    if isinstance(bias, Tensor):
        anchor = torch.cat([anchor, bias.double().unsqueeze(1)], dim=1)
    ridge = _best_ridge(anchor, fit, held_out)
    solution = RidgeFit(anchor, fit.merged(held_out)).towards(ridge)
    if isinstance(bias, Tensor):
        bias.copy_(solution[:, -1])
        solution = solution[:, :-1]
    weight.copy_(solution)
    return ridge


def _best_ridge(anchor: Tensor, fit: CrossMoments, held_out: CrossMoments) -> float:
    if held_out.count == 0:
        return RIDGES[len(RIDGES) // 2]
    fitted, held_out_means = RidgeFit(anchor, fit), held_out.means()
    return min(RIDGES, key=lambda ridge: error(fitted.towards(ridge), held_out_means))


class RidgeFit:
    """The normal equations of one output projection, solved for any ridge, all in float64."""

    def __init__(self, anchor_DN: Tensor, moments: CrossMoments) -> None:
        self._anchor_DN = anchor_DN
        self._xx, yx, _ = moments.means()
        self._inputs = slice(0, self._xx.shape[0] - moments.with_bias)
        weights = self._xx.diagonal()[self._inputs]
        least = _DEAD * float(weights.mean())
        self._weights = weights.clamp_min(least if least > 0 else 1.0)
        self._residual_ND = (yx - anchor_DN @ self._xx).T

    def towards(self, ridge: float) -> Tensor:
        """Return argmin_W E|W x - y|^2 + ridge sum_j E[x_j^2] |W_j - anchor_j|^2.

        Shape (D, N [+ 1]); the bias column is not damped.
        """
        system = self._xx.clone()
        system.diagonal()[self._inputs] += ridge * self._weights
        step_ND = torch.cholesky_solve(self._residual_ND, torch.linalg.cholesky(system))
        return self._anchor_DN + step_ND.T


def error(weight: Tensor, means: Means) -> float:
    """Return E|W x - y|^2 per token, from moments alone."""
    xx, yx, yy = means
    return float(((weight @ xx) * weight).sum() - 2 * (weight * yx).sum()) + yy
