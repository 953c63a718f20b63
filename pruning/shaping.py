"""Models of a plan's shape for the stopwatch: no weight is copied, and none means anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families import family_of
from pruning.plan import Plan
from pruning.slicing import per_layer_class, per_layer_config
from pruning.streaming import is_streamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def shaped(dense: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return a model with the widths of `plan`, for timing alone.

    Every weight is a contiguous view of the first numbers of its dense namesake's memory: as fast
    to read as the weights of the sliced model, and any number of such models costs nothing. What
    it computes is meaningless. Correction biases are left out. Of a streamed model the first layer
    stands for all: what a processor caches of it would be too fast, of large layers that is little.
    """
    from accelerate import init_empty_weights

    family, _ = family_of(dense)
    config = per_layer_config(family, dense.config, plan, has_biases=False)
    with init_empty_weights(include_buffers=False):
        model = per_layer_class(family)(config)
    weights = _held_weights(dense)
    views = {
        name: _first(weights[name], shape.shape)
        for name, shape in model.state_dict().items()
        if name in weights
    }
    model.load_state_dict(views, assign=True)
    model.tie_weights()
    model.set_attn_implementation(dense.config._attn_implementation)
    return model.to(dense.device).eval().requires_grad_(False)


def _held_weights(dense: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by name, those of the first layer for all of a streamed model."""
    weights: dict[str, Tensor] = dense.state_dict()
    if not is_streamed(dense):
        return weights
    for layer in dense.get_submodule("model.layers")[:1]:
        first = {name: x.detach() for name, x in layer.named_parameters()}
    for name in weights:
        if name.startswith("model.layers."):
            weights[name] = first[name.split(".", 3)[3]]
    return weights


def _first(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight.detach().reshape(-1)[: shape.numel()].view(shape)
