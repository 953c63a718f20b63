"""Shards: the tensors of a folder of safetensors files, read and written a few at a time."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Shards:
    """The tensors of a model folder by name; no values are read before they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds what, and in what shape.

        Raises:
            ValueError: there is no safetensors file, or one is missing or damaged.
        """
        self.folder = folder
        self._files: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file, names in _files(folder).items():
            shapes = _shapes(folder / file)
            if missing := sorted(names - shapes.keys()):
                raise ValueError(f"{folder / file}: {missing[0]} is missing")
            named = {name: shapes[name] for name in sorted(names) or shapes}
            self._files |= dict.fromkeys(named, file)
            self._shapes |= named

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._files

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._shapes:
            raise ValueError(f"{self.folder}: no tensor {name}")
        return self._shapes[name]

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of one's own: what is mapped from the file is not kept.

        A copy lies where torch puts its tensors, not where the file happens to have it: products
        come out bit by bit as those of a model in memory.
        """
        with safe_open(self.folder / self._files[name], "pt") as file:
            mapped: Tensor = file.get_tensor(name)
        return mapped.to(device, dtype, copy=True)


class ShardWriter:
    """Writes tensors as the shards of a model folder, one after another, and then their index."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self._folder, self._num_shards = folder, num_shards
        self._files: dict[str, str] = {}
        self._bytes = self._shards = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard.

        Raises:
            OSError: it cannot be written.
        """
        self._shards += 1
        name = f"model-{self._shards:05d}-of-{self._num_shards:05d}.safetensors"
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save(plain, self._folder / name, {"format": "pt"})
        self._files |= dict.fromkeys(plain, name)
        self._bytes += sum(x.numel() * x.element_size() for x in plain.values())

    def close(self) -> None:
        """Write the index: from here on the folder can be read."""
        assert self._shards == self._num_shards
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._files}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # what a full disk raises while weights are written
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def _files(folder: Path) -> dict[str, set[str]]:
    """Return the safetensors files of a model folder, with the tensors that an index puts there.

    Raises:
        ValueError: there are none, or the index of the shards is damaged.
    """
    if (folder / _SINGLE).is_file():
        return {_SINGLE: set()}
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder}: no {_SINGLE} and no {INDEX}; allowed: safetensors")
    files: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index}: not an index of shards") from None
    return dict(sorted(files.items()))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of one file by name, from its header."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
