"""The elastic model: ranked once, permuted once, every plan runs on slices of the same weights.

Shapes: B sequences, T tokens, D hidden size; in layers: H query heads, K KV groups, R query heads
a group, F MLP channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pruning.architecture import Architecture
from pruning.families import Family, run_layer
from pruning.plan import AttentionUnit, Grid, LayerPlan, Plan
from pruning.ranking import Order, head_rows, order_of, permuted, unit_scores
from pruning.reconstruction.correction import correction
from pruning.statistics import LayerStatistics, stream_statistics

LayerParameters = dict[str, Tensor]


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


@dataclass(frozen=True)
class Recipe:
    """How units are ranked and how survivors are corrected."""

    metric: str
    reconstruction: str
    ridge: float
    unit: AttentionUnit = "kv_group"
    seed: int = 0

    @property
    def has_biases(self) -> bool:
        """Whether the correction puts a bias on every output projection."""
        return self.reconstruction != "none"


class ElasticLayer:
    """One decoder layer whose units stand in rank order, cut anywhere on demand."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        architecture: Architecture,
        statistics: LayerStatistics,
        recipe: Recipe,
    ) -> None:
        dense = dict(layer.named_parameters())
        wide = (
            torch.float64 if dense[f"{family.o}.weight"].dtype == torch.float64 else torch.float32
        )
        output = dense[f"{family.o}.weight"].detach().to(wide)
        down = dense[f"{family.down}.weight"].detach().to(wide)
        scores = unit_scores(recipe.metric, output, down, statistics, architecture, recipe.seed)
        self.order: Order = order_of(scores, recipe.unit)
        self._family, self._architecture, self._unit = family, architecture, recipe.unit
        self._dense = dense
        self._permute_inputs()
        # Query heads leave rank by rank across all groups, so that a cut is always a prefix.
        heads = self.order.heads if recipe.unit == "kv_group" else self.order.heads.T
        columns = head_rows(heads, architecture.head_dim)
        channels = self.order.channels
        self._attention, self._mlp = (
            correction(
                recipe.reconstruction, weight[:, index], permuted(moments, index), recipe.ridge
            )
            for weight, moments, index in (
                (output, statistics.attention, columns),
                (down, statistics.mlp, channels),
            )
        )
        self.residual_energy = (
            statistics.attention.residual_energy,
            statistics.mlp.residual_energy,
        )

    def _permute_inputs(self) -> None:
        """Put the rows of q, k, v, gate and up into rank order, once."""
        family, head_dim = self._family, self._architecture.head_dim
        rows = {
            family.q: head_rows(self.order.heads, head_dim),
            family.k: head_rows(self.order.groups, head_dim),
            family.v: head_rows(self.order.groups, head_dim),
            family.gate: self.order.channels,
            family.up: self.order.channels,
        }
        self._inputs = {
            f"{role}.{kind}": self._dense[f"{role}.{kind}"].detach()[index].contiguous()
            for role, index in rows.items()
            for kind in ("weight", "bias")
            if f"{role}.{kind}" in self._dense
        }
        outputs = (f"{family.o}.", f"{family.down}.")
        self._others = {
            name: tensor.detach()
            for name, tensor in self._dense.items()
            if name not in self._inputs and not name.startswith(outputs)
        }

    def inputs(self, plan: LayerPlan) -> LayerParameters:
        """Return everything but the output projections for `plan`, as views where possible."""
        head_dim = self._architecture.head_dim
        kv = plan.kv_groups * head_dim
        family = self._family
        result = dict(self._others)
        for name, tensor in self._inputs.items():
            if name.startswith(family.q):
                grouped = tensor.view(self._architecture.kv_heads, -1, *tensor.shape[1:])
                kept = grouped[: plan.kv_groups, : plan.q_per_group * head_dim]
                result[name] = kept.reshape(-1, *tensor.shape[1:])
            elif name.startswith((family.k, family.v)):
                result[name] = tensor[:kv]
            else:
                result[name] = tensor[: plan.mlp_channels]
        return result

    def attention_output(self, plan: LayerPlan) -> LayerParameters:
        """Return weight and bias of o for `plan`, in the dtype of the model."""
        kept = plan.kv_groups * plan.q_per_group * self._architecture.head_dim
        weight, bias = self._attention.cut(kept)
        if self._unit == "query_head" and plan.q_per_group > 1:
            shape = (plan.q_per_group, plan.kv_groups, self._architecture.head_dim)
            weight = weight.unflatten(1, shape).transpose(1, 2).flatten(1)
        return self._output(self._family.o, weight, bias)

    def mlp_output(self, plan: LayerPlan) -> LayerParameters:
        """Return weight and bias of down for `plan`, in the dtype of the model."""
        weight, bias = self._mlp.cut(plan.mlp_channels)
        return self._output(self._family.down, weight, bias)

    def _output(self, role: str, weight: Tensor, bias: Tensor | None) -> LayerParameters:
        dtype = self._dense[f"{role}.weight"].dtype
        # Stored (in, out): a prefix of input channels stays contiguous.
        result = {f"{role}.weight": weight.T.to(dtype).contiguous().T}
        dense_bias = self._dense.get(f"{role}.bias")
        if bias is not None and dense_bias is not None:
            bias = bias + dense_bias
        bias = dense_bias if bias is None else bias
        if bias is not None:
            result[f"{role}.bias"] = bias.to(dtype)
        return result

    def parameters(self, plan: LayerPlan) -> LayerParameters:
        """Return all parameters of the layer under `plan`, named as in the stock layer."""
        return self.inputs(plan) | self.attention_output(plan) | self.mlp_output(plan)

    def cut_errors(self, grid: Grid) -> tuple[list[float], list[float]]:
        """Return the relative error of every attention level and MLP level of `grid`.

        Expected squared output error per token over the median energy of the residual stream
        the block writes to: comparable across layers and blocks, 0 at the dense level.
        """
        attention, mlp = self._attention.errors(), self._mlp.errors()
        widths = [
            layer.kv_groups * layer.q_per_group * self._architecture.head_dim
            for layer in (grid.layer(level, 0) for level in range(len(grid.attention)))
        ]
        return (
            [float(attention[k]) / self.residual_energy[0] for k in widths],
            [float(mlp[k]) / self.residual_energy[1] for k in grid.mlp],
        )


class ElasticModel:
    """A dense model that runs as any plan: no masks, no copies of what a cut does not change."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        layers: Sequence[ElasticLayer],
        cache_bytes: int = 512 * 2**20,
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
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> ElasticModel:
        """Return the elastic model from one dense calibration pass, one layer at a time.

        `tokens_BT` are calibration sequences; `on_layer(index)` is called after each layer.
        """
        layers = []
        statistics = stream_statistics(model, family, tokens_BT, batch_size)
        for index, (layer, measured) in enumerate(
            zip(family.layers(model), statistics, strict=True)
        ):
            layers.append(ElasticLayer(layer, family, architecture, measured, recipe))
            on_layer(index)
        return cls(model, family, layers)

    def orders(self, plan: Plan) -> list[Order]:
        """Return the ranking of every layer: the same for every plan."""
        del plan
        return [layer.order for layer in self.layers]

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
        branches: dict[LayerPlan, list[tuple[int, Plan]]] = {}
        for index, plan in plans:
            branches.setdefault(plan.layers[depth], []).append((index, plan))
        for layer_plan, branch in branches.items():
            parameters = self.layer_parameters(depth, layer_plan)
            layer = self.family.layers(self.model)[depth]
            output = run_cut_layer(layer, layer_plan, parameters, hidden, rotary)
            yield from self._descend(depth + 1, branch, output, rotary)


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


def run_cut_layer(
    layer: nn.Module,
    plan: LayerPlan,
    parameters: LayerParameters,
    hidden_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the output of a stock layer that runs on other parameters than its own."""
    attention = layer.get_submodule("self_attn")
    dense_groups = attention.num_key_value_groups
    attention.num_key_value_groups = plan.q_per_group  # type: ignore[assignment]
    try:
        output: Tensor = functional_call(
            _Call(layer), {f"layer.{k}": v for k, v in parameters.items()}, (hidden_BTD, rotary)
        )
    finally:
        attention.num_key_value_groups = dense_groups
    return output


class _Call(nn.Module):
    """A module whose forward is `run_layer`, for functional_call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return run_layer(self.layer, hidden_BTD, rotary)


def _num_bytes(parameters: LayerParameters) -> int:
    return sum(x.numel() * x.element_size() for x in parameters.values())
