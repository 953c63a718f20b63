"""Curvature: how much the predictions suffer from an error in what a block writes.

A small error d in a block's output, independent from token to token, moves the next-token
distribution of a dense model by a divergence of d' F d / 2 nats, with F = E[g g'] the Fisher matrix
of the output: g is the gradient of the log-likelihood of tokens drawn from the model's own
predictions. With the covariance of the inputs this makes the Kronecker-factored curvature of the
output projection (K-FAC, Martens & Grosse, arXiv 1503.05671; for pruning LLM Surgeon, van der
Ouderaa et al., arXiv 2312.17244). One forward and one backward pass of the dense model, layer by
layer: a streamed model needs one layer at a time.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.backward import backward
from pruning.families import Family, run_attention, run_layer, run_mlp
from pruning.gram import filled, products
from pruning.reconstruction.damping import factored
from pruning.spool import Spool, Tensors, held

_ROWS = 512  # tokens whose logits are in memory at a time
_DAMPING = 1e-6  # of the mean diagonal of F: fewer tokens than D leave it singular


@dataclass(frozen=True)
class LayerCurvature:
    """Roots R (D, D) in float32 of both blocks of a layer: |R d|^2 is a divergence in nats."""

    kept: Tensors

    @property
    def attention(self) -> Tensor:
        """The root of the attention block."""
        return self.kept["attention"]

    @property
    def mlp(self) -> Tensor:
        """The root of the MLP."""
        return self.kept["mlp"]


@torch.no_grad()
def stream_curvature(
    model: nn.Module,
    family: Family,
    tokens_BT: Tensor,
    *,
    batch_size: int = 8,
    seed: int = 0,
    spool: Spool | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[LayerCurvature]:
    """Return the curvature of every layer of the dense model.

    `tokens_BT` are equally long sequences without padding; `seed` draws the tokens that are told
    apart; `spool` takes the inputs and roots of the layers, instead of memory; `on_layer` is
    called for each layer, on the way up and on the way down.

    Raises:
        ValueError: an activation or a gradient is not finite.
    """
    device = family.head(model).device
    hidden = [family.embed(model, x.to(device)) for x in tokens_BT.split(batch_size)]
    rotary = family.rotary(model, hidden[0])
    layers, inputs = family.layers(model), list[Tensors]()
    keeps = [held if spool is None else spool.of_layer(i) for i in range(len(layers))]
    for layer, keep in zip(layers, keeps, strict=True):
        inputs.append(keep({str(i): x for i, x in enumerate(hidden)}))
        hidden = [run_layer(layer, x, rotary) for x in hidden]
        on_layer()
    generator = torch.Generator(device).manual_seed(seed)
    gradients = [_head_gradient(model, family, x, generator) for x in hidden]
    found = list[LayerCurvature]()
    for index in reversed(range(len(layers))):
        entering = inputs.pop()
        for layer in layers[index : index + 1]:
            roots = _back(layer, [entering[str(i)] for i in range(len(hidden))], gradients, rotary)
            found.append(LayerCurvature(keeps[index](roots)))
        on_layer()
    return found[::-1]


def _back(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    gradients: list[Tensor],
    rotary: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Take the gradients (B, T, D) from behind a layer to before it; return the roots."""
    attention, mlp = _Fisher(), _Fisher()
    for index, entering in enumerate(inputs):
        mlp.add(gradients[index])
        between, gradients[index] = backward(
            entering,
            lambda x: run_attention(layer, x, rotary),
            lambda x: run_mlp(layer, x),
            gradients[index],
        )
        attention.add(between)
    return {"attention": attention.root(), "mlp": mlp.root()}


class _Fisher:
    """The running sum of g g' of one block."""

    def __init__(self) -> None:
        self._count, self._total = 0, torch.zeros(())

    def add(self, gradient_BTD: Tensor) -> None:
        """Add a micro-batch; products in float32."""
        rows = gradient_BTD.flatten(0, 1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._total = products(rows) + self._total.to(rows)
        self._count += len(rows)

    def root(self) -> Tensor:
        """Return R (D, D) with R'R = F / 2.

        Raises:
            ValueError: a gradient was not finite.
        """
        if not bool(self._total.isfinite().all()):
            raise ValueError("pruning.fisher_tokens: a gradient is not finite; try dtype: float32")
        half = filled(self._total.double() / (2 * self._count))
        level = float(half.diagonal().mean())
        factor, _ = factored(half, _DAMPING * level if level > 0 else _DAMPING)
        return factor.T.to(self._total.dtype).contiguous()


def _head_gradient(
    model: nn.Module, family: Family, hidden_BTD: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the gradient (B, T, D) of log p(y) where the last layer ends, y drawn from p.

    Raises:
        ValueError: an activation is not finite.
    """
    with torch.enable_grad():
        last = hidden_BTD.detach().requires_grad_()
        normed = family.final_norm(model)(last)
    head_VD, rows = family.head(model), normed.detach().flatten(0, 1)
    gradient = torch.empty_like(rows)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        excess = (part @ head_VD.T).float().softmax(-1)
        if not bool(excess.isfinite().all()):
            raise ValueError("calibration: the activations are not finite; try dtype: float32")
        drawn = torch.multinomial(excess, 1, generator=generator)
        excess.scatter_add_(-1, drawn, torch.full_like(drawn, -1, dtype=excess.dtype))
        gradient[start : start + _ROWS] = -(excess.to(head_VD.dtype) @ head_VD)
    (found,) = torch.autograd.grad(normed, last, gradient.view_as(normed))
    return found
