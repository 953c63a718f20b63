"""Sequential pruning, as published for Wanda-sp: each layer is ranked on the pruned prefix.

The units of a late layer then depend on what earlier layers kept, so that every plan needs a
calibration pass of its own and no ranking can be shared between plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pruning.architecture import Architecture
from pruning.curvature import LayerCurvature
from pruning.elastic import run_cut_layer, run_plan
from pruning.elastic_layer import ElasticLayer, LayerParameters, Recipe
from pruning.families import Family
from pruning.plan import Plan
from pruning.ranking import Order
from pruning.statistics import layer_statistics


class SequentialModel:
    """A dense model that runs as any plan, calibrated anew for each (the last one is kept)."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        architecture: Architecture,
        tokens_BT: Tensor,
        recipe: Recipe,
        *,
        batch_size: int = 8,
        curvature: Sequence[LayerCurvature] | None = None,
    ) -> None:
        self.model, self.family = model, family
        self._architecture, self._recipe = architecture, recipe
        self._tokens, self._batch_size, self._curvature = tokens_BT, batch_size, curvature
        self._last: tuple[Plan, list[LayerParameters], list[Order]] | None = None

    def parameters(self, plan: Plan) -> list[LayerParameters]:
        """Return the parameters of every layer under `plan`."""
        return self._prune(plan)[1]

    def orders(self, plan: Plan) -> list[Order]:
        """Return the ranking of every layer that `plan` led to."""
        return self._prune(plan)[2]

    @torch.no_grad()
    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(plan index, normed final hidden states (B, T, D))`, plan by plan."""
        for index, plan in enumerate(plans):
            yield index, run_plan(self, plan, self.parameters(plan), tokens_BT)

    @torch.no_grad()
    def _prune(self, plan: Plan) -> tuple[Plan, list[LayerParameters], list[Order]]:
        if self._last is not None and self._last[0] == plan:
            return self._last
        device = self.family.head(self.model).device
        batches = self._tokens.split(self._batch_size)
        hidden = [self.family.embed(self.model, x.to(device)) for x in batches]
        rotary = self.family.rotary(self.model, hidden[0])
        parameters, orders = [], []
        layers = zip(self.family.layers(self.model), plan.layers, strict=True)
        for index, (layer, kept) in enumerate(layers):
            statistics, _ = layer_statistics(
                self.family, layer, hidden, rotary, self._recipe.holds_out
            )
            own = self._recipe.for_layer(index)
            ranked = ElasticLayer(
                layer,
                self.family,
                self._architecture,
                statistics,
                own,
                curvature=None if self._curvature is None else self._curvature[index],
            )
            tensors = ranked.parameters(kept)
            hidden = [run_cut_layer(layer, kept, tensors, x, rotary) for x in hidden]
            parameters.append(tensors)
            orders.append(ranked.order)
        self._last = (plan, parameters, orders)
        return self._last
