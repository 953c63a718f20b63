"""The elastic model: ranked once, permuted once, every plan runs on slices of the same weights.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pruning.architecture import Architecture
from pruning.curvature import LayerCurvature
from pruning.elastic_layer import ElasticLayer, LayerParameters, Recipe
from pruning.facts import AllocationFacts
from pruning.families import Family, run_layer
from pruning.plan import LayerPlan, Plan
from pruning.ranking import Order
from pruning.spool import Spool, held
from pruning.statistics import LayerStatistics, stream_statistics

CACHE_BYTES = 512 * 2**20
"""Bytes of cuts that are kept for later plans."""


class Prunable(Protocol):
    """A dense model that runs as any plan and can say what its parameters would be."""

    model: nn.Module
    family: Family

    def parameters(self, plan: Plan) -> list[LayerParameters]:
        """Return the parameters of every layer under `plan`, named as in the stock layer."""

    def orders(self, plan: Plan) -> list[Order]:
        """Return the ranking that `plan` is to be read with."""

    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(plan index, normed final hidden states (B, T, D))` in any order."""


class ElasticModel:
    """A dense model that runs as any plan: no masks, no copies of what a cut does not change."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        layers: Sequence[ElasticLayer],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model, self.family, self.layers = model, family, list(layers)
        self._cache: OrderedDict[tuple[int, str, tuple[int, ...]], LayerParameters] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0

    @classmethod
    def rank(
        cls,
        model: nn.Module,
        family: Family,
        architecture: Architecture,
        tokens_BT: Tensor,
        recipe: Recipe,
        *,
        batch_size: int = 8,
        curvature: Sequence[LayerCurvature] | None = None,
        spool: Spool | None = None,
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> ElasticModel:
        """Return the elastic model from one dense calibration pass, one layer at a time.

        `tokens_BT` are calibration sequences; `curvature` of each layer measures errors; `spool`
        takes what cuts are made from, instead of memory; `on_layer(index)` is called after each
        layer.
        """
        measured = stream_statistics(model, family, tokens_BT, batch_size, recipe.holds_out)
        return cls.of(
            model,
            family,
            architecture,
            measured,
            recipe,
            curvature=curvature,
            spool=spool,
            on_layer=on_layer,
        )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        family: Family,
        architecture: Architecture,
        statistics: Iterable[LayerStatistics],
        recipe: Recipe,
        *,
        curvature: Sequence[LayerCurvature] | None = None,
        spool: Spool | None = None,
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> ElasticModel:
        """Return the elastic model from the statistics of each layer, taken one at a time."""
        layers = []
        for index, (layer, measured) in enumerate(
            zip(family.layers(model), statistics, strict=True)
        ):
            own = recipe.for_layer(index)
            keep = held if spool is None else spool.of_layer(index)
            measure = None if curvature is None else curvature[index]
            layers.append(ElasticLayer(layer, family, architecture, measured, own, keep, measure))
            on_layer(index)
        return cls(model, family, layers)

    def orders(self, plan: Plan) -> list[Order]:
        """Return the ranking of every layer: the same for every plan."""
        del plan
        return [layer.order for layer in self.layers]

    @property
    def facts(self) -> AllocationFacts:
        """What classical allocators ask of the layers: plain numbers."""
        return AllocationFacts.of(layer.facts for layer in self.layers)

    def parameters(self, plan: Plan) -> list[LayerParameters]:
        """Return the parameters of every layer under `plan`: what slicing writes down."""
        return [self.layer_parameters(i, layer) for i, layer in enumerate(plan.layers)]

    def layer_parameters(self, index: int, plan: LayerPlan) -> LayerParameters:
        """Return the parameters of one layer under `plan`, named as in the stock layer."""
        layer = self.layers[index]
        attention = (plan.kv_groups, plan.q_per_group)
        return (
            layer.inputs(plan)
            | self._cached((index, "attention", attention), lambda: layer.attention_output(plan))
            | self._cached((index, "mlp", (plan.mlp_channels,)), lambda: layer.mlp_output(plan))
        )

    def _cached(
        self, key: tuple[int, str, tuple[int, ...]], make: Callable[[], LayerParameters]
    ) -> LayerParameters:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        value = self._cache[key] = make()
        self._cached_bytes += _num_bytes(value)
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= _num_bytes(self._cache.popitem(last=False)[1])
        return value

    def forget(self) -> None:
        """Drop all cuts that were kept for later."""
        self._cache.clear()
        self._cached_bytes = 0

    @torch.no_grad()
    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(plan index, normed final hidden states (B, T, D))` for every plan.

        Plans are walked as a trie, depth first: those that agree up to a layer share the hidden
        states up to there. The order of the results follows the trie, not the input.
        """
        hidden = self.family.embed(self.model, tokens_BT.to(self.family.head(self.model).device))
        rotary = self.family.rotary(self.model, hidden)
        yield from self._descend(0, list(enumerate(plans)), hidden, rotary)

    def _descend(
        self,
        depth: int,
        plans: list[tuple[int, Plan]],
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        if depth == len(self.layers):
            final = self.family.final_norm(self.model)(hidden)
            yield from ((index, final) for index, _ in plans)
            return
        for layer_plan, branch in branches(plans, depth).items():
            parameters = self.layer_parameters(depth, layer_plan)
            layer = self.family.layers(self.model)[depth]
            output = run_cut_layer(layer, layer_plan, parameters, hidden, rotary)
            yield from self._descend(depth + 1, branch, output, rotary)


def branches(
    plans: Iterable[tuple[int, Plan]], depth: int
) -> dict[LayerPlan, list[tuple[int, Plan]]]:
    """Return numbered plans by what they keep of layer `depth`."""
    found: dict[LayerPlan, list[tuple[int, Plan]]] = {}
    for index, plan in plans:
        found.setdefault(plan.layers[depth], []).append((index, plan))
    return found


def run_plan(
    prunable: Prunable, plan: Plan, parameters: Sequence[LayerParameters], tokens_BT: Tensor
) -> Tensor:
    """Return the normed final hidden states (B, T, D) of the model on given layer parameters."""
    model, family = prunable.model, prunable.family
    hidden = family.embed(model, tokens_BT.to(family.head(model).device))
    rotary = family.rotary(model, hidden)
    for layer, kept, tensors in zip(family.layers(model), plan.layers, parameters, strict=True):
        hidden = run_cut_layer(layer, kept, tensors, hidden, rotary)
    final: Tensor = family.final_norm(model)(hidden)
    return final


Run = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]


def run_cut_layer(
    layer: nn.Module,
    plan: LayerPlan,
    parameters: LayerParameters,
    hidden_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    run: Run = run_layer,
) -> Tensor:
    """Return the output of a stock layer, or of a part of it, on other parameters than its own."""
    attention = layer.get_submodule("self_attn")
    dense_groups = attention.num_key_value_groups
    attention.num_key_value_groups = plan.q_per_group  # type: ignore[assignment]
    try:
        output: Tensor = functional_call(
            _Call(layer, run),
            {f"layer.{k}": v for k, v in parameters.items()},
            (hidden_BTD, rotary),
        )
    finally:
        attention.num_key_value_groups = dense_groups
    return output


class _Call(nn.Module):
    """A module whose forward runs a layer or a part of it, for functional_call."""

    def __init__(self, layer: nn.Module, run: Run) -> None:
        super().__init__()
        self.layer, self._run = layer, run

    def forward(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(self.layer, hidden_BTD, rotary)


def _num_bytes(parameters: LayerParameters) -> int:
    return sum(x.numel() * x.element_size() for x in parameters.values())
