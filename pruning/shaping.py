"""Models of a plan's shape for the stopwatch: no weight is copied, and none means anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families import family_of
from pruning.plan import Plan
from pruning.slicing import per_layer_class, per_layer_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def shaped(dense: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return a model with the widths of `plan`, for timing alone.

    Every weight is a contiguous view of the first numbers of its dense namesake's memory: as fast
    to read as the weights of the sliced model, and any number of such models costs nothing. What
    it computes is meaningless. Correction biases are left out.
    """
    from accelerate import init_empty_weights

    family, _ = family_of(dense)
    config = per_layer_config(family, dense.config, plan, has_biases=False)
    with init_empty_weights(include_buffers=False):
        model = per_layer_class(family)(config)
    weights = dense.state_dict()
    views = {
        name: _first(weights[name], shape.shape)
        for name, shape in model.state_dict().items()
        if name in weights
    }
    model.load_state_dict(views, assign=True)
    model.tie_weights()
    model.set_attn_implementation(dense.config._attn_implementation)
    return model.to(dense.device).eval().requires_grad_(False)


def _first(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight.detach().reshape(-1)[: shape.numel()].view(shape)
