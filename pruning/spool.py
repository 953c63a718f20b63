"""A spool: tensors of many layers on disk, those of one layer at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pruning.shards import save

Tensors = Mapping[str, Tensor]
Keep = Callable[[Tensors], Tensors]

_TRANSPOSED = "transposed:"


def held(tensors: Tensors) -> Tensors:
    """Return the tensors as they are: the way of keeping them in memory."""
    return tensors


class Spool:
    """A folder of tensors, kept layer by layer; it is read back from the file as a mapping.

    What was read stays in memory until something of another layer is read. Another process, to
    which it is sent, reads the same files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0
        self._layer: int | None = None
        self._read: dict[tuple[Path, str], Tensor] = {}

    def of_layer(self, index: int) -> Keep:
        """Return the way of keeping tensors of one layer.

        Raises:
            OSError: (of what is returned) the disk is full.
        """

        def keep(tensors: Tensors) -> Tensors:
            self._count += 1
            path = self._folder / f"{index:05d}-{self._count:05d}.safetensors"
            save(_as_they_lie(tensors), path)
            return _Spooled(self, index, path, {name: x.device for name, x in tensors.items()})

        return keep

    def __getstate__(self) -> dict[str, Any]:
        """Return where the files are, without what was read."""
        return self.__dict__ | {"_layer": None, "_read": {}}

    def get(self, layer: int, path: Path, name: str, device: torch.device) -> Tensor:
        """Return a tensor of a layer from its file, on `device`."""
        if self._layer != layer:
            self._read.clear()
            self._layer = layer
        if (path, name) not in self._read:
            self._read[path, name] = _read(path, name, device)
        return self._read[path, name]


class _Spooled(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(
        self, spool: Spool, layer: int, path: Path, devices: Mapping[str, torch.device]
    ) -> None:
        self._spool, self._layer, self._path, self._devices = spool, layer, path, devices

    def __getitem__(self, name: str) -> Tensor:
        return self._spool.get(self._layer, self._path, name, self._devices[name])

    def __contains__(self, name: object) -> bool:
        return name in self._devices

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)


def _as_they_lie(tensors: Tensors) -> dict[str, Tensor]:
    """Return matrices whose columns are contiguous as their transposes, named so.

    The bits of a product or a solution depend on how a matrix lies in memory: what is read back
    has to lie as what was kept.
    """
    plain: dict[str, Tensor] = {}
    for name, x in tensors.items():
        is_turned = x.dim() == 2 and not x.is_contiguous() and x.T.is_contiguous()
        key, lying = (_TRANSPOSED + name, x.T) if is_turned else (name, x.contiguous())
        plain[key] = lying.detach().cpu()
    return plain


def _read(path: Path, name: str, device: torch.device) -> Tensor:
    with safe_open(path, "pt") as file:
        is_turned = name not in file.keys()  # noqa: SIM118, the file is no mapping
        mapped: Tensor = file.get_tensor(_TRANSPOSED + name if is_turned else name)
    own = mapped.to(device, copy=True)
    return own.T if is_turned else own
