"""One decoder layer in rank order, cut anywhere on demand.

Shapes: O output channels, N input channels of an output projection; H query heads, K KV groups, R
query heads a group, F MLP channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.functional import pad

from pruning.architecture import Architecture
from pruning.curvature import LayerCurvature
from pruning.facts import LayerFacts, outlier_share, standardised_scores
from pruning.families import Family
from pruning.metrics.registry import REMOVAL_METRICS
from pruning.output_projection import OutputProjection, output_projections
from pruning.plan import AttentionUnit, Grid, LayerPlan
from pruning.ranking import Order, head_rows, order_of, permuted, unit_scores
from pruning.reconstruction.correction import OutputGradient, correction
from pruning.reconstruction.ridge import Ridge, held_out_ridge
from pruning.spool import Keep, held
from pruning.statistics import LayerStatistics

LayerParameters = dict[str, Tensor]

_KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Recipe:
    """How units are ranked and how survivors are corrected.

    `metric` ranks MLP channels, and attention units where `attention_metric` is None.
    `ridge` is that of the least-squares correction and of the metric that assumes it; `auto`
    takes for each block the one with the least error on held-out calibration tokens.
    """

    metric: str
    reconstruction: str
    ridge: Ridge
    unit: AttentionUnit = "kv_group"
    seed: int = 0
    attention_metric: str | None = None

    @property
    def metrics(self) -> tuple[str, str]:
        """Metrics of attention units and of MLP channels."""
        return self.attention_metric or self.metric, self.metric

    def for_layer(self, index: int) -> Recipe:
        """Return the recipe with a seed of the layer's own."""
        return replace(self, seed=1_000 * self.seed + 2 * index)

    @property
    def has_biases(self) -> bool:
        """Whether the correction puts a bias on every output projection."""
        return self.reconstruction != "none"

    @property
    def holds_out(self) -> bool:
        """Whether calibration keeps the moments of held-out tokens apart, to choose a ridge."""
        has_ridge = self.reconstruction == "least_squares" or any(
            metric in REMOVAL_METRICS for metric in self.metrics
        )
        return has_ridge and self.ridge == "auto"

    def ridge_of(self, projection: OutputProjection) -> float:
        """Return the ridge for one output projection."""
        return held_out_ridge(projection) if self.ridge == "auto" else self.ridge


class ElasticLayer:
    """One decoder layer whose units stand in rank order, cut anywhere on demand."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        architecture: Architecture,
        statistics: LayerStatistics,
        recipe: Recipe,
        keep: Keep = held,
        curvature: LayerCurvature | None = None,
    ) -> None:
        """Rank the units of a dense layer; `keep` is where the tensors of the cuts go.

        With a `curvature` units are ranked by what they do to the predictions.
        """
        self._family, self._architecture, self._unit = family, architecture, recipe.unit
        dense = {name: x.detach() for name, x in layer.named_parameters()}
        blocks = output_projections(dense, family, architecture, recipe.unit, statistics, curvature)
        self.ridges = (recipe.ridge_of(blocks[0]), recipe.ridge_of(blocks[1]))
        scores = unit_scores(
            recipe.metrics, *blocks, architecture, ridges=self.ridges, seed=recipe.seed
        )
        self.order: Order = order_of(scores, recipe.unit)
        self._dtype = dense[f"{family.o}.weight"].dtype
        self._output_biases = {
            name: dense[name]
            for name in (f"{role}.bias" for role in (family.o, family.down))
            if name in dense
        }
        self._inputs = keep(self._in_rank_order(dense))
        # Query heads leave rank by rank across all groups, so that a cut is always a prefix.
        heads = self.order.heads if recipe.unit == "kv_group" else self.order.heads.T
        columns = (head_rows(heads, architecture.head_dim), self.order.channels)
        self._attention, self._mlp = (
            correction(
                recipe.reconstruction,
                x.weight[:, index],
                permuted(x.statistics, index),
                ridge,
                keep,
            )
            for x, index, ridge in zip(blocks, columns, self.ridges, strict=True)
        )
        self.residual_energy = (
            statistics.attention.residual_energy,
            statistics.mlp.residual_energy,
        )
        self.facts = LayerFacts(
            outlier_share(family, dense, statistics),
            standardised_scores(blocks[0], columns[0], squared=True),
            standardised_scores(blocks[1], columns[1], squared=False),
        )

    def _in_rank_order(self, dense: LayerParameters) -> LayerParameters:
        """Return all but the output projections: q, k, v, gate and up with their rows in order."""
        family, head_dim = self._family, self._architecture.head_dim
        rows = {
            family.q: head_rows(self.order.heads, head_dim),
            family.k: head_rows(self.order.groups, head_dim),
            family.v: head_rows(self.order.groups, head_dim),
            family.gate: self.order.channels,
            family.up: self.order.channels,
        }
        index_of = {f"{role}.{kind}": x for role, x in rows.items() for kind in _KINDS}
        outputs = {f"{role}.{kind}" for role in (family.o, family.down) for kind in _KINDS}
        return {
            name: x[index_of[name]].contiguous() if name in index_of else x
            for name, x in dense.items()
            if name not in outputs
        }

    def inputs(self, plan: LayerPlan) -> LayerParameters:
        """Return everything but the output projections for `plan`, as views where possible."""
        head_dim = self._architecture.head_dim
        kv = plan.kv_groups * head_dim
        family = self._family
        result = {}
        for name, tensor in self._inputs.items():
            if name.startswith(family.q):
                grouped = tensor.view(self._architecture.kv_heads, -1, *tensor.shape[1:])
                kept = grouped[: plan.kv_groups, : plan.q_per_group * head_dim]
                result[name] = kept.reshape(-1, *tensor.shape[1:])
            elif name.startswith((family.k, family.v)):
                result[name] = tensor[:kv]
            elif name.startswith((family.gate, family.up)):
                result[name] = tensor[: plan.mlp_channels]
            else:
                result[name] = tensor
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
        # Stored (in, out): a prefix of input channels stays contiguous.
        result = {f"{role}.weight": weight.T.to(self._dtype).contiguous().T}
        dense_bias = self._output_biases.get(f"{role}.bias")
        if bias is not None and dense_bias is not None:
            bias = bias + dense_bias
        bias = dense_bias if bias is None else bias
        if bias is not None:
            result[f"{role}.bias"] = bias.to(self._dtype)
        return result

    def parameters(self, plan: LayerPlan) -> LayerParameters:
        """Return all parameters of the layer under `plan`, named as in the stock layer."""
        return self.inputs(plan) | self.attention_output(plan) | self.mlp_output(plan)

    def padded(self, plan: LayerPlan) -> LayerParameters:
        """Return parameters of the dense shape that compute what `plan` does, in rank order.

        The output projections have zeros where they have no channels.
        """
        dense = LayerPlan(
            self._architecture.kv_heads, self._architecture.q_per_group, self._architecture.mlp
        )
        head_dim, family = self._architecture.head_dim, self._family
        attention, mlp = self.attention_output(plan), self.mlp_output(plan)
        name = f"{family.o}.weight"
        kept = attention[name].unflatten(1, (plan.kv_groups, plan.q_per_group, head_dim))
        wide = kept.new_zeros(len(kept), dense.kv_groups, dense.q_per_group, head_dim)
        wide[:, : plan.kv_groups, : plan.q_per_group] = kept
        attention[name] = wide.flatten(1)
        name = f"{family.down}.weight"
        mlp[name] = pad(mlp[name], (0, dense.mlp_channels - plan.mlp_channels))
        return self.inputs(dense) | attention | mlp

    def cut_errors(
        self, grid: Grid, curvature: LayerCurvature | None = None
    ) -> tuple[list[float], list[float]]:
        """Return the error of every attention level and MLP level of `grid`.

        With a curvature the divergence in nats per token that the cut is expected to cause by
        itself; without one the expected squared output error per token over the median energy of
        the residual stream that the block writes to. Comparable across layers and blocks, 0 at the
        dense level.
        """
        widths = self._attention_widths(grid)
        if curvature is None:
            attention = self._attention.errors(widths) / self.residual_energy[0]
            mlp = self._mlp.errors(grid.mlp) / self.residual_energy[1]
        else:
            attention = self._attention.errors(widths, curvature.attention)
            mlp = self._mlp.errors(grid.mlp, curvature.mlp)
        return attention.tolist(), mlp.tolist()

    def slopes(
        self, grid: Grid, attention: OutputGradient, mlp: OutputGradient
    ) -> tuple[list[float], list[float]]:
        """Return what keeping each attention and MLP level adds to a loss, to first order.

        The gradients are those of the loss in what both blocks write under some plan, met with the
        inputs of the dense blocks' output projections there, as `inputs` orders them. Only
        differences between levels of a block mean anything.
        """
        if self._unit == "query_head":
            attention = replace(attention, cross=self._by_rank(attention.cross))
        return (
            self._attention.slopes(self._attention_widths(grid), attention).tolist(),
            self._mlp.slopes(grid.mlp, mlp).tolist(),
        )

    def _attention_widths(self, grid: Grid) -> list[int]:
        """Return how many channels of the attention's output projection each level keeps."""
        layers = [grid.layer(level, 0) for level in range(len(grid.attention))]
        return [x.kv_groups * x.q_per_group * self._architecture.head_dim for x in layers]

    def _by_rank(self, columns_ON: Tensor) -> Tensor:
        """Return columns that stand group by group rank by rank, as their correction has them."""
        groups, head_dim = self._architecture.kv_heads, self._architecture.head_dim
        grouped: Tensor = columns_ON.unflatten(1, (groups, -1, head_dim))
        return grouped.transpose(1, 2).flatten(1)
