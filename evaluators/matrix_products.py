"""The matrix products of a prefill, timed alone: the speed that a model's shapes allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evaluators.latency import clock


@torch.inference_mode()
def product_seconds(model: nn.Module, batch: int, tokens: int, seed: int) -> float:
    """Return the seconds that all linear layers of `model` take for `batch * tokens` rows.

    Each is called once, in the model's order, on random rows of its own width; the head sees one
    row a sequence, as in a prefill that makes the last logits. Rows of all widths are views of one
    buffer: a pruned model has many widths. What is left out: attention, norms, activations,
    residual sums, the cache, and all Python between them.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    layers = [x for x in model.modules() if isinstance(x, nn.Linear) and x is not head]
    weight = layers[0].weight
    device = weight.device
    generator = torch.Generator(device).manual_seed(seed)
    widest = max(x.in_features for x in [*layers, head])
    values = torch.randn(
        batch * tokens * widest, generator=generator, device=device, dtype=weight.dtype
    )

    def rows(count: int, width: int) -> Tensor:
        return values[: count * width].view(count, width)

    start = clock(device)
    for linear in layers:
        linear(rows(batch * tokens, linear.in_features))
    head(rows(batch, head.in_features))
    return clock(device) - start
