"""Predicted speed: the time of a forward pass as a linear function of what a plan keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.elastic import Prunable, run_cut_layer, run_plan
from pruning.elastic_streamed import StreamedElastic
from pruning.plan import Grid, Plan


@dataclass(frozen=True)
class SpeedModel:
    """`milliseconds = base + per_head * query heads + per_channel * MLP channels`, none negative.

    Fitted to whole forward passes of this machine (one sequence of `tokens`, head left out); it
    ranks plans, the report times the finished model.
    """

    base: float
    per_head: float
    per_channel: float
    dense: Plan
    tokens: int

    def milliseconds(self, plan: Plan) -> float:
        """Return the predicted time of one forward pass."""
        heads, channels = _sizes(plan)
        return self.base + self.per_head * heads + self.per_channel * channels

    def speedup(self, plan: Plan) -> float:
        """Return the predicted time of the dense model over that of `plan`."""
        return self.milliseconds(self.dense) / self.milliseconds(plan)

    def per_unit(self, grid: Grid) -> tuple[float, float]:
        """Return the microseconds of one attention unit and of one MLP step."""
        heads = self.dense.layers[0].q_per_group if grid.unit == "kv_group" else 1
        return 1000 * self.per_head * heads, 1000 * self.per_channel * grid.mlp[0]

    def to_json(self) -> dict[str, float]:
        """Return plain JSON data without the dense plan."""
        return {
            "base": self.base,
            "per_head": self.per_head,
            "per_channel": self.per_channel,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, float], dense: Plan) -> SpeedModel:
        """Return the model that `to_json` wrote."""
        slopes = data["base"], data["per_head"], data["per_channel"]
        return cls(*slopes, dense, int(data["tokens"]))


@torch.no_grad()
def fit_speed(
    prunable: Prunable, grid: Grid, layers: int, *, tokens: int = 256, rounds: int = 5
) -> SpeedModel:
    """Return the model fitted to four plans, timed in turn for `rounds` rounds (medians).

    The plans are the corners of the grid: dense and smallest attention, dense and smallest MLP.
    Of a streamed model the first layer is timed and stands for all.
    """
    top = (len(grid.attention) - 1, len(grid.mlp) - 1)
    corners = [top, (0, top[1]), (top[0], 0), (0, 0)]
    plans = [grid.plan([corner] * layers) for corner in dict.fromkeys(corners)]
    run = _runner(prunable, plans, torch.zeros(1, tokens, dtype=torch.long))
    share = layers if isinstance(prunable, StreamedElastic) else 1
    seconds = np.zeros((rounds + 1, len(plans)))
    for round_ in range(rounds + 1):
        for column in range(len(plans)):
            started = time.perf_counter()
            run(column).sum().item()
            seconds[round_, column] = time.perf_counter() - started
    medians = 1000 * share * np.median(seconds[1:], axis=0)
    rows = np.array([(1.0, *_sizes(plan)) for plan in plans])
    base, per_head, per_channel = np.linalg.lstsq(rows, medians, rcond=None)[0].clip(min=0)
    return SpeedModel(float(base), float(per_head), float(per_channel), plans[0], tokens)


def _runner(prunable: Prunable, plans: Sequence[Plan], ids: Tensor) -> Callable[[int], Tensor]:
    """Return what runs a plan by its number, with parameters that are made once."""
    if not isinstance(prunable, StreamedElastic):
        parameters = [prunable.parameters(plan) for plan in plans]
        return lambda number: run_plan(prunable, plans[number], parameters[number], ids)
    model, family = prunable.model, prunable.family
    kept = [plan.layers[0] for plan in plans]
    firsts = [prunable.layer_parameters(0, layer) for layer in kept]
    hidden = family.embed(model, ids.to(family.head(model).device))
    rotary = family.rotary(model, hidden)
    module = family.layers(model)[0]
    return lambda number: run_cut_layer(module, kept[number], firsts[number], hidden, rotary)


def _sizes(plan: Plan) -> tuple[int, int]:
    heads = sum(layer.kv_groups * layer.q_per_group for layer in plan.layers)
    return heads, sum(layer.mlp_channels for layer in plan.layers)
