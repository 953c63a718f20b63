"""The stopwatch: one phase of a model timed again and again, models in turn.

Layers are called as the stock model calls them, without the making of masks: on unpadded sequences
attention needs none. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluators.latency import clock
from pruning.families import Family
from pruning.slicing import layer_plan
from selfpruner.latency_table import Workload

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_WARM = 3  # calls on a GPU before a graph is captured, and replays before one is timed
_LEAST_SECONDS = 0.2  # of one visit: short calls are timed several times
_MOST_CALLS = 10


def take_turns(
    models: Sequence[PreTrainedModel],
    family: Family,
    workload: Workload,
    rounds: int,
    *,
    graphs: bool,
    on_visit: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Return milliseconds (rounds, models).

    Models take turns, in an order that is reversed from one round to the next, so that a machine
    that drifts does so for all alike. `graphs` replays CUDA graphs on a GPU, where launching
    kernels one by one would hide how long they take. Otherwise every model is called by turns with
    the first one, and what counts is how long it takes beside that: other processes then slow both.
    """
    replays = graphs and models[0].device.type == "cuda"
    found = np.ones((rounds, len(models)))
    # A GPU's memory may hold one cache and no second.
    reference = None if replays else Pass(models[0], family, workload)
    references = [] if reference is None else [_one_call(reference) for _ in range(2)][1:]
    order = list(enumerate(models))
    for round_ in range(rounds):
        for index, model in order:
            if reference is None:
                found[round_, index] = _replayed(Pass(model, family, workload, in_place=True))
            elif index:
                pairs = _beside(reference, Pass(model, family, workload))
                found[round_, index] = np.median(pairs[:, 1] / pairs[:, 0])
                references.extend(pairs[:, 0])
            on_visit()
        order.reverse()
    return found if replays else found * np.median(references)


class Pass:
    """One phase of one model, ready to be run any number of times from the same state.

    `in_place`: the cache keeps its memory from call to call, as a CUDA graph needs it; otherwise
    it is the one that grows, the default of transformers.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        workload: Workload,
        *,
        in_place: bool = False,
    ) -> None:
        self._model, self._family, self._workload = model, family, workload
        self.device = model.device
        decodes = workload.phase == "decode"
        self._past = workload.tokens if decodes else 0
        length = 1 if decodes else workload.tokens
        self._tokens_BT = torch.zeros(workload.batch, length, dtype=torch.long, device=model.device)
        positions = torch.arange(self._past, self._past + length, device=model.device)
        embedded = family.embed(model, self._tokens_BT)
        rotary = model.get_submodule("model.rotary_emb")
        self._rotary = rotary(embedded, position_ids=positions.unsqueeze(0))
        self._cache = self._filled_cache(in_place) if decodes else None
        self._kept = [(x.keys, x.values) for x in self._cache.layers] if self._cache else []

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the logits of the last position (B, 1, vocabulary)."""
        cache = self._cache if self._cache is not None else self._new_cache()
        hidden = self._family.embed(self._model, self._tokens_BT)
        for layer in self._family.layers(self._model):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=self._rotary,
                past_key_values=cache,
                use_cache=True,
            )
        hidden = self._family.final_norm(self._model)(hidden[:, -1:])
        logits: Tensor = self._model.get_submodule("lm_head")(hidden)
        return logits

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the token that the last call left in the cache."""
        if self._cache is None:
            return
        for layer, (keys, values) in zip(self._cache.layers, self._kept, strict=True):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(self._past)

    def _new_cache(self) -> Cache:
        from transformers import DynamicCache

        return DynamicCache()

    def _filled_cache(self, in_place: bool) -> Cache:
        """Return a cache that holds the tokens before, with room for one more."""
        from transformers.cache_utils import Cache, StaticLayer

        layers = list(self._family.layers(self._model))
        cache = self._new_cache()
        if in_place:
            cache = Cache(layers=[StaticLayer(max_cache_len=self._past + 1) for _ in layers])
        for index, (layer, kept) in enumerate(
            zip(layers, layer_plan(self._model).layers, strict=True)
        ):
            rows = layer.get_parameter(f"{self._family.k}.weight").shape[0]
            shape = (self._workload.batch, kept.kv_groups, self._past, rows // kept.kv_groups)
            zeros = torch.zeros(shape, dtype=self._model.dtype, device=self.device)
            cache.update(zeros, zeros.clone(), index)
        return cache


def _beside(reference: Pass, run: Pass) -> NDArray[np.float64]:
    """Return the milliseconds (calls, 2) of two passes that are called by turns."""
    took = 2 * _one_call(run)  # the first call warms up, and says how many there is time for
    calls = max(1, min(_MOST_CALLS, int(1000 * _LEAST_SECONDS / took)))
    return np.array([(_one_call(reference), _one_call(run)) for _ in range(calls)])


def _one_call(run: Pass) -> float:
    run.reset()
    started = clock(run.device)
    run()
    return 1000 * (clock(run.device) - started)


def _replayed(run: Pass) -> float:
    """Return the median milliseconds of a replayed CUDA graph, timed by events of the device."""
    stream = torch.cuda.Stream(run.device)
    stream.wait_stream(torch.cuda.current_stream(run.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            run.reset()
            run()
    torch.cuda.current_stream(run.device).wait_stream(stream)
    run.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    found = []
    for _ in range(_WARM + _MOST_CALLS):
        run.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(run.device)
        found.append(start.elapsed_time(end))
    return float(np.median(found[_WARM:]))
