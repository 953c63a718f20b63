"""Export: a Hugging Face folder that stock transformers loads without this project."""

from __future__ import annotations

import copy
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pruning import modeling_pruned
from pruning.streaming import LayerWriter, StreamedLayers, is_streamed, layer_tensors

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# Settings that only some ways to generate read; transformers refuses to save them for others.
_OF_BEAMS = ("early_stopping", "length_penalty")
_OF_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "top_k",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_return_sequences",
)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Write weights (safetensors), configuration, tokenizer and, unless the model is a stock
    one, the self-contained modelling file; return the model, converted in place.

    Raises:
        OSError: the folder cannot be written.
    """
    cast_parameters(model, dtype)
    model.generation_config = _savable(model.generation_config, model.config)
    if is_stock(model):
        vars(model.config).pop("auto_map", None)  # of code that is not written beside it
    else:
        name = type(model).__name__
        module = "modeling_pruned"
        model.config.auto_map = {
            "AutoConfig": f"{module}.{type(model.config).__name__}",
            "AutoModel": f"{module}.{name.replace('ForCausalLM', 'Model')}",
            "AutoModelForCausalLM": f"{module}.{name}",
        }
    folder.mkdir(parents=True, exist_ok=True)
    if is_streamed(model):
        _save_streamed(model, folder, dtype)
    else:
        _save_held(model, folder)
    tokenizer.save_pretrained(folder)
    if not is_stock(model):
        shutil.copyfile(str(modeling_pruned.__file__), folder / "modeling_pruned.py")
    return model


def _savable(config: GenerationConfig, model: PreTrainedConfig) -> GenerationConfig:
    """Return how to generate, as near to `config` as transformers lets be saved.

    It loads settings that it does not save. Vicuna's, among others, name a temperature but not
    `do_sample`: that is sampling. Else what no way to generate reads is left out, and where that
    does not do, the settings are those of the model's configuration.
    """
    found = copy.deepcopy(config)
    if not _is_valid(found) and (found.num_beams or 1) == 1:
        _leave_out(found, _OF_BEAMS)
    if not _is_valid(found) and found.do_sample is None and found.temperature != 0:
        found.do_sample = True
    if not _is_valid(found) or (found.temperature == 0 and not found.do_sample):
        _leave_out(found, _OF_SAMPLING)
    return found if _is_valid(found) else type(config).from_model_config(model)


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _leave_out(config: GenerationConfig, names: Sequence[str]) -> None:
    for name in names:
        setattr(config, name, None)


def _save_held(model: PreTrainedModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what a full disk raises while weights are written
        raise OSError(errno.EIO, str(error).splitlines()[0], str(folder)) from error


def _save_streamed(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write what `save_pretrained` does, one shard a layer."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    writer = LayerWriter(model, folder, dtype)
    for index, layer in enumerate(model.get_submodule("model.layers")):
        writer.add(layer_tensors(layer, index))
    writer.close()


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert the parameters of `model` in place and return it; streamed layers as they are read.

    Buffers stay: `Module.to` would round the rotary frequencies, which loading keeps in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    layers = model.get_submodule("model.layers")
    if isinstance(layers, StreamedLayers):
        layers.dtype = dtype
    model.config.dtype = dtype
    return model


def is_stock(model: PreTrainedModel) -> bool:
    """Return whether the model is a class of transformers itself."""
    return type(model).__module__.startswith("transformers.")
