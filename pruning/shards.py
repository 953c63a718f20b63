"""Shards: the tensors of a folder of safetensors files, read and written a few at a time."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Shards:
    """The tensors of a model folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds what.

        Raises:
            ValueError: there is no safetensors file, or one is missing or damaged.
        """
        self.folder = folder
        self._files = _files_by_name(folder)

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._files

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


def _files_by_name(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files: dict[str, str] = index["weight_map"]
    elif (folder / _SINGLE).is_file():
        files = dict.fromkeys(_names(folder / _SINGLE), _SINGLE)
    else:
        raise ValueError(f"{folder}: no {INDEX} and no {_SINGLE}; only safetensors are streamed")
    for file in sorted(set(files.values())):
        found = _names(folder / file)
        if missing := sorted(k for k, v in files.items() if v == file and k not in found):
            raise ValueError(f"{folder / file}: {missing[0]} is missing")
    return files


def _names(path: Path) -> set[str]:
    """Return the names of the tensors of one file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
