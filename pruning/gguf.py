"""A model folder as one GGUF file, which stock llama.cpp loads and runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pruning.llama_cpp import HEAD_NORMS, NORMS, PROJECTIONS, Graph, Shape, graph_for
from pruning.shards import Shards
from pruning.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

FileType = Literal["f32", "f16", "q8_0"]

_FREQUENCIES = "rope_freqs.weight"
_COMPUTED = "rotary_emb.inv_freq"  # stored by some older checkpoints, read by nobody
_BLOCK = 32  # values that share a scale in Q8_0
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    folder: Path,
    path: Path,
    dtype: FileType = "f16",
    on_tensor: Callable[[], None] = lambda: None,
) -> str:
    """Write the model and the tokenizer in `folder` as `path`; return llama.cpp's architecture.

    Tensors are read and written one by one, and the file takes its name when it is complete.

    Args:
        folder: a Hugging Face folder, of a stock or of an exported model.
        path: the file; one that is there is replaced.
        dtype: of the matrices; `q8_0` where rows are whole blocks of 32 values, else f16. Norms
            and biases stay in float32.
        on_tensor: called after each tensor.

    Raises:
        ValueError: the folder holds no such model, llama.cpp cannot run it or cannot read its
            tokenizer, or a value does not fit float16; one line.
        OSError: the file cannot be written.
    """
    file = _File.of(folder, dtype)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file.write(temporary, on_tensor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return file.graph.name


@dataclass(frozen=True)
class _Tensor:
    """One tensor: its name in the file, that in the folder, and its heads if it is rotated."""

    name: str
    source: str
    rotary_heads: int = 0


@dataclass(frozen=True)
class _File:
    """Everything that goes into a file; values are read when they are written."""

    config: PreTrainedConfig
    weights: Shards
    shape: Shape
    graph: Graph
    vocabulary: Vocabulary
    tensors: tuple[_Tensor, ...]
    dtype: FileType

    @classmethod
    def of(cls, folder: Path, dtype: FileType) -> _File:
        config, weights = _config(folder), Shards(folder)
        shape = Shape.of(config, weights)
        return cls(
            config=config,
            weights=weights,
            shape=shape,
            graph=graph_for(shape),
            vocabulary=Vocabulary.of(folder, int(config.vocab_size)),
            tensors=tuple(_tensors(config, weights, shape)),
            dtype=dtype,
        )

    def write(self, path: Path, on_tensor: Callable[[], None]) -> None:
        """Write keys, then the entries of all tensors, then their values."""
        from gguf import GGUFWriter

        factors = frequency_factors(self.config) if self.shape.frequency_factors else None
        writer = GGUFWriter(path, self.graph.name)
        try:
            self._add_keys(writer)
            for tensor in self.tensors:
                _declare(writer, tensor.name, self.weights.shape(tensor.source), self.dtype)
            if factors is not None:
                _declare(writer, _FREQUENCIES, factors.shape, self.dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self.tensors:
                writer.write_tensor_data(self._values(tensor))
                on_tensor()
            if factors is not None:
                writer.write_tensor_data(factors)
        finally:
            writer.close()

    def _values(self, tensor: _Tensor) -> NDArray[Any]:
        values = self.weights.read(tensor.source, torch.float32, torch.device("cpu")).numpy()
        if self.graph.interleaved and tensor.rotary_heads:
            values = interleaved(values, tensor.rotary_heads)
        return _packed(tensor.source, values, self.dtype)

    def _add_keys(self, writer: GGUFWriter) -> None:
        import gguf

        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[self.dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._add_sizes(writer)
        self._add_rope(writer)
        self.vocabulary.add_to(writer)

    def _add_sizes(self, writer: GGUFWriter) -> None:
        """Add what describes the network; one value a layer where the graph takes them."""
        config, layers = self.config, self.shape.layers
        writer.add_block_count(len(layers))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.shape.head_dim)
        writer.add_value_length(self.shape.head_dim)
        for add, column in (
            (writer.add_head_count, [x.heads for x in layers]),
            (writer.add_head_count_kv, [x.kv_heads for x in layers]),
            (writer.add_feed_forward_length, [x.mlp for x in layers]),
        ):
            add(column if self.graph.widths_per_layer else column[0])

    def _add_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = self.config.rope_parameters
        writer.add_rope_dimension_count(self.shape.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])


def _config(folder: Path) -> PreTrainedConfig:
    """Return the configuration in `folder`.

    Raises:
        ValueError: there is none, or transformers does not read it.
    """
    from transformers import AutoConfig

    from pruning.registration import register_with_transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json")
    register_with_transformers()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"config.json: {str(error).strip().splitlines()[0]}") from error
    return config


def _tensors(config: PreTrainedConfig, weights: Shards, shape: Shape) -> Iterator[_Tensor]:
    """Yield the tensors of the file in order; a tied head is not stored twice.

    Raises:
        ValueError: one is missing, or has no place in the file.
    """
    places = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        places["output"] = "lm_head"
    rotary_heads = {}
    roles = NORMS | PROJECTIONS | (HEAD_NORMS if shape.head_norms else {})
    for index, layer in enumerate(shape.layers):
        places |= {f"blk.{index}.{roles[role]}": f"model.layers.{index}.{role}" for role in roles}
        rotary_heads[f"blk.{index}.attn_q"] = layer.heads
        rotary_heads[f"blk.{index}.attn_k"] = layer.kv_heads
    used = {"lm_head.weight"}
    for name, source in places.items():
        for part in ("weight", "bias"):
            full = f"{source}.{part}"
            if part == "weight" or full in weights:
                weights.shape(full)  # raises where it is missing
                used.add(full)
                yield _Tensor(f"{name}.{part}", full, rotary_heads.get(name, 0))
    homeless = sorted(x for x in set(weights) - used if not x.endswith(_COMPUTED))
    if homeless:
        raise ValueError(f"safetensors: a GGUF file has no place for the tensor {homeless[0]}")


def _stored(shape: tuple[int, ...], dtype: FileType) -> GGMLQuantizationType:
    """Return the type that a tensor of this shape is stored in."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1 or dtype == "f32":
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % _BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _declare(writer: GGUFWriter, name: str, shape: tuple[int, ...], dtype: FileType) -> None:
    """Add a tensor's entry; its values follow once the entries of all are written."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    stored = _stored(shape, dtype)
    if stored == GGMLQuantizationType.Q8_0:
        in_bytes = quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), stored)
        return
    kind = np.dtype(np.float32 if stored == GGMLQuantizationType.F32 else np.float16)
    writer.add_tensor_info(name, shape, kind, math.prod(shape) * kind.itemsize)


def _packed(name: str, values: NDArray[np.float32], dtype: FileType) -> NDArray[Any]:
    """Return the values as they are stored.

    Raises:
        ValueError: one does not fit float16.
    """
    from gguf import GGMLQuantizationType, quantize

    stored = _stored(values.shape, dtype)
    largest = max(values.max(), -values.min())
    if stored == GGMLQuantizationType.F16 and not largest <= np.finfo(np.float16).max:
        raise ValueError(f"{name}: {largest} does not fit float16; --dtype f32 holds it")
    packed: NDArray[Any] = quantize(np.ascontiguousarray(values), stored)
    return packed


def interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return rows (R, ...) with each head's rotary pairs (i, i + d/2) as neighbours (2i, 2i + 1).

    R is heads times the head size d. The same order on queries and on keys leaves their products
    as they were.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def frequency_factors(config: PreTrainedConfig) -> NDArray[np.float32]:
    """Return what Llama 3.1 divides each rotary frequency by, (half the head size,).

    With t the turns that a frequency makes in the original context: 1 from t = high_freq_factor
    on, `factor` up to t = low_freq_factor, in between a blend that is linear in its inverse.
    """
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelengths = 2 * np.pi * float(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)
    return factors
