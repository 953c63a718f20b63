"""The weights of a model folder, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """Names, shapes and values of the safetensors in a folder, in one file or in shards."""

    def __init__(self, folder: Path) -> None:
        """Read the names and shapes alone.

        Raises:
            ValueError: there are no such files, or they are damaged.
        """
        from safetensors import SafetensorError, safe_open

        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _files(folder):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        self._files[name] = path
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path.name}: cannot be read: {error}") from None

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
            raise ValueError(f"safetensors: no tensor {name}")
        return self._shapes[name]

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor in float32."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            values: NDArray[np.float32] = file.get_tensor(name).float().numpy()
        return values


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ValueError: there are none, or the index of the shards is damaged.
    """
    if (folder / _ONE).is_file():
        return [folder / _ONE]
    index = folder / _INDEX
    if not index.is_file():
        raise ValueError(f"{folder}: no {_ONE} and no {_INDEX}")
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{_INDEX}: not an index of shards") from None
