"""The elastic model layer by layer: a generation goes through one layer together, then the next.

Shapes: B sequences a micro-batch, S sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.elastic import ElasticModel, branches, run_cut_layer
from pruning.plan import LayerPlan, Plan


@dataclass
class _Branch:
    """Plans that agree so far, and their hidden states: a micro-batch (B, T, D) each."""

    plans: list[tuple[int, Plan]]
    hidden: list[Tensor]


class LayerwiseElastic(ElasticModel):
    """An elastic model that makes each cut once a call of `hidden_states`, and then lets it go.

    It is for cuts that come from a spool, and for those of models so large that a plan's do not fit
    the cache. Give it all sequences at once, in `batch_size` of which it runs. Hidden states of all
    sequences are held for every plan that has parted from the others, those of at most one layer
    twice.
    """

    def __init__(self, ranked: ElasticModel, batch_size: int) -> None:
        super().__init__(ranked.model, ranked.family, ranked.layers)
        self._batch_size = batch_size

    @torch.no_grad()
    def hidden_states(
        self, plans: Sequence[Plan], tokens_BT: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(plan index, normed final hidden states (S, T, D))` for every plan.

        Bit by bit those of `ElasticModel` on micro-batches of the same size.
        """
        batches = tokens_BT.split(self._batch_size)
        for index, hidden in self.hidden_batches(plans, batches):
            yield index, torch.cat(hidden)

    @torch.no_grad()
    def hidden_batches(
        self, plans: Sequence[Plan], batches: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield `(plan index, normed final hidden states)`: (B, T, D) for each micro-batch (B, T).

        Micro-batches may differ in T.
        """
        device = self.family.head(self.model).device
        hidden = [self.family.embed(self.model, x.to(device)) for x in batches]
        rotary = {x.shape[1]: self.family.rotary(self.model, x) for x in hidden}
        front = [_Branch(list(enumerate(plans)), hidden)]
        del hidden
        for depth in range(len(self.layers)):
            front = self._advanced(front, depth, rotary)
        norm = self.family.final_norm(self.model)
        while front:
            branch = front.pop()
            branch.hidden = [norm(x) for x in branch.hidden]
            yield from ((index, branch.hidden) for index, _ in branch.plans)

    def _advanced(
        self, front: list[_Branch], depth: int, rotary: Mapping[int, tuple[Tensor, Tensor]]
    ) -> list[_Branch]:
        """Return the branches after one more layer; `front` is used up, `rotary` is by length.

        Cut by cut, so that each is made once however many branches it is met in.
        """
        self.forget()
        cuts: dict[LayerPlan, list[_Branch]] = {}
        while front:
            parent = front.pop()
            for layer_plan, plans in branches(parent.plans, depth).items():
                cuts.setdefault(layer_plan, []).append(_Branch(plans, parent.hidden))
        module = self.family.layers(self.model)[depth]
        advanced = []
        for layer_plan in sorted(cuts, key=_mlp_first):
            parameters = self.layer_parameters(depth, layer_plan)
            for branch in cuts.pop(layer_plan):
                hidden = [
                    run_cut_layer(module, layer_plan, parameters, x, rotary[x.shape[1]])
                    for x in branch.hidden
                ]
                advanced.append(_Branch(branch.plans, hidden))
        return advanced


def _mlp_first(plan: LayerPlan) -> tuple[int, int, int]:
    """Return the order of cuts: equal widths of the MLP, whose cut is the dearer one, together."""
    return plan.mlp_channels, plan.kv_groups, plan.q_per_group
