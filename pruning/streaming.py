"""Streaming: a model whose decoder layers lie on disk and are in memory one at a time.

Such a model is a stock one in every other way. Whatever goes through its layers in order, the
stock forward pass included, runs on it unchanged, as on a model in memory.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.families import Family, run_layer
from pruning.shards import Shards, ShardWriter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYERS = "model.layers"


class StreamedLayers(nn.ModuleList):
    """Decoder layers that are lent: iterating over them gives one after another its weights.

    A layer has its weights from the moment it is handed out until the next one is asked for; what
    was written into them is lost then. `layers[index]` is the bare module, its weights on the meta
    device; a slice is to be iterated over.
    """

    def __init__(
        self, layers: nn.ModuleList, shards: Shards, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers)
        self.dtype = dtype
        self._shards, self._device = shards, device
        self._loans: Counter[int] = Counter()

    def __iter__(self) -> Iterator[nn.Module]:
        """Lend every layer in turn."""
        return self._lent(range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Return the bare module, or an iterator that lends those of a slice."""
        if isinstance(index, slice):
            return self._lent(range(len(self))[index])
        return super().__getitem__(index)

    def _lent(self, indices: range) -> Iterator[nn.Module]:
        for index in indices:
            layer: nn.Module = super().__getitem__(index)
            if not self._loans[index]:
                layer.load_state_dict(self._weights(layer, index), assign=True)
            self._loans[index] += 1
            try:
                yield layer
            finally:
                self._loans[index] -= 1
                if not self._loans[index]:
                    layer.to("meta")

    def _weights(self, layer: nn.Module, index: int) -> dict[str, Tensor]:
        return {
            name: self._shards.read(f"{_LAYERS}.{index}.{name}", self.dtype, self._device)
            for name, _ in layer.named_parameters()
        }


def streamed_model(
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
) -> PreTrainedModel:
    """Return the model of `folder` in evaluation mode, its layers streamed from there.

    `make` is the class of the model, or whatever makes one from a configuration. Embedding, final
    norm and head are in memory. The weights are not to be trained.

    Raises:
        ValueError: the folder holds no safetensors, not all weights, or others.
    """
    from accelerate import init_empty_weights

    shards, device = Shards(folder), torch.device(device)
    with init_empty_weights(include_buffers=False):
        model = make(config)
    model.requires_grad_(False)
    model.tie_weights()
    outer, missing, tied = {}, [], _tied(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in shards and name not in tied:
            missing.append(name)
        parameter.data = parameter.data.to(dtype)
        if name in shards and not name.startswith(f"{_LAYERS}."):
            outer[name] = shards.read(name, dtype, device)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first {sorted(missing)[0]}")
    check_homes(set(shards) - dict(model.named_parameters(remove_duplicate=False)).keys())
    model.load_state_dict(outer, strict=False, assign=True)
    model.tie_weights()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.config.dtype = dtype
    model.set_attn_implementation("sdpa")
    trunk = model.get_submodule("model")
    trunk.layers = StreamedLayers(model.get_submodule(_LAYERS), shards, dtype, device)
    return model.eval()


def check_homes(unexpected: Iterable[str]) -> None:
    """Refuse stored tensors that the model has no place for: scales or biases would be lost.

    Raises:
        ValueError: one is no frequency of rotary embeddings, which old checkpoints hold.
    """
    homeless = sorted(x for x in unexpected if not x.endswith("rotary_emb.inv_freq"))
    if homeless:
        raise ValueError(
            f"{len(homeless)} stored weights have no place in the model, the first {homeless[0]}"
        )


class LayerWriter:
    """Writes the weights of a model, one shard a layer, where not all are in memory."""

    def __init__(
        self, model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None
    ) -> None:
        """Begin with what is outside the layers, from `model`; all in `dtype`, or as it is.

        Raises:
            OSError: the folder cannot be written.
        """
        self._dtype = dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._shards = ShardWriter(folder, 1 + model.config.num_hidden_layers)
        tied = _tied(model)
        self.add(
            {
                name: x
                for name, x in model.state_dict().items()
                if not name.startswith(f"{_LAYERS}.") and name not in tied
            }
        )

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next layer, its weights named as in the model.

        Raises:
            OSError: it cannot be written.
        """
        cast = {
            name: x if self._dtype is None else x.to(self._dtype) for name, x in tensors.items()
        }
        self._shards.add(cast)

    def close(self) -> None:
        """Make the folder readable: all layers are there."""
        self._shards.close()


def layer_tensors(layer: nn.Module, index: int) -> dict[str, Tensor]:
    """Return the weights of a layer, named as in the model."""
    return {f"{_LAYERS}.{index}.{name}": x for name, x in layer.named_parameters()}


def reopened(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a model like a streamed one, with the weights of another folder.

    Raises:
        ValueError: the folder does not hold all of them.
    """
    config = copy.deepcopy(model.config)
    other = streamed_model(type(model), config, folder, model.dtype, model.device)
    other.generation_config = model.generation_config
    return other


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the names of weights that are others once more."""
    return set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()


def is_streamed(model: nn.Module) -> bool:
    """Return whether the layers of a model are in memory one at a time only."""
    return isinstance(model.get_submodule(_LAYERS), StreamedLayers)


def streamed_sizes(model: nn.Module) -> tuple[int, int]:
    """Return the parameters of a streamed model, tied weights once, and their bytes."""
    head, embedding = model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")
    once = [x for name, x in model.named_parameters() if not name.startswith("lm_head.")]
    if head.weight is not embedding.weight:
        once += list(head.parameters())
    return sum(x.numel() for x in once), sum(x.numel() * x.element_size() for x in once)


def batch_logits(model: nn.Module, family: Family, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the logits (B, T, V) of micro-batches of tokens; every layer is read once for all."""
    head = model.get_submodule("lm_head")
    for hidden in final_states(model, family, batches):
        with torch.no_grad():
            logits: Tensor = head(hidden)
        yield logits


@torch.no_grad()
def final_states(model: nn.Module, family: Family, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the normed final hidden states (B, T, D) of micro-batches of tokens (B, T).

    Layer by layer: every layer of a streamed model is read once, whatever the number of batches.
    All have the same T. Bit by bit what the stock trunk returns for each.
    """
    device = family.head(model).device
    hidden = [family.embed(model, x.to(device)) for x in batches]
    rotary = family.rotary(model, hidden[0])
    for layer in family.layers(model):
        for index, x in enumerate(hidden):
            hidden[index] = run_layer(layer, x, rotary)
    norm = family.final_norm(model)
    return [norm(x) for x in hidden]
