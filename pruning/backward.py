"""The way back through one decoder layer, for gradients in what its two blocks write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def backward(
    before_BTD: Tensor,
    attention: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    gradient_BTD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients (B, T, D) between the blocks of a layer and before it.

    `before_BTD` enters the layer; `attention` and `mlp` return the residual stream behind their
    block; `gradient_BTD` is the one behind the layer. What a block writes is added to the stream,
    so that the gradient of its output is that of the stream behind it. Attention goes the plain
    way: on a GPU the gradients of its fused kernels differ from call to call, and a resumed run
    has to find the same.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        before = before_BTD.detach().requires_grad_()
        middle = attention(before)
        cut = middle.detach().requires_grad_()
        after = mlp(cut)
    (between,) = torch.autograd.grad(after, cut, gradient_BTD)
    (found,) = torch.autograd.grad(middle, before, between)
    return between, found
