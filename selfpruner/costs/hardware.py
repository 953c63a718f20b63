"""Hardware as data: what one device holds, computes and costs, from `configs/hardware/*.yaml`."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from selfpruner.complaints import complaints
from selfpruner.config import CONFIGS
from selfpruner.settings import Settings
from selfpruner.yaml_text import read_mapping

Precision = Literal["bfloat16", "float32", "float64"]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]

FOLDER = CONFIGS / "hardware"
_GIB = 2**30


class Tflops(Settings):
    """10^12 floating-point operations a second that the maker states, without sparsity."""

    bfloat16: Positive
    float32: Positive
    float64: Positive


class Achievable(Settings):
    """Shares of the peak that are reached: by matrix products, and by factorisations and solves."""

    products: Share
    solves: Share


class Price(Settings):
    """Money for one device and hour, in a currency of the user's choice."""

    hour: Annotated[float, Field(ge=0)]
    currency: Annotated[str, Field(min_length=1)] = "EUR"


class Hardware(Settings):
    """Devices of one kind.

    `reserved_gib` is what no tensor can have: context, libraries, fragments. `bandwidth_gb` of
    memory and `disk_gb` are 10^9 bytes a second, and so is `offload_gb` of weights in CPU memory
    that a GPU has no room for; without it they are read from disk. `layer_ms` is the least time of
    a decoder layer in eager mode, however small. `start_seconds` is what a run takes until it can
    compute, besides reading weights.
    """

    description: Annotated[str, Field(min_length=1)]
    gpu: bool = True
    devices: Annotated[int, Field(ge=1)] = 1
    memory_gib: Positive
    reserved_gib: Annotated[float, Field(ge=0)]
    tflops: Tflops
    achievable: Achievable
    bandwidth_gb: Positive
    disk_gb: Positive
    offload_gb: Positive | None = None
    layer_ms: Annotated[float, Field(ge=0)]
    start_seconds: Annotated[float, Field(ge=0)]
    price: Price

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.reserved_gib >= self.memory_gib:
            raise ValueError(
                f"reserved_gib: got {self.reserved_gib:g}; allowed: less than memory_gib "
                f"{self.memory_gib:g}"
            )
        return self

    @property
    def usable_bytes(self) -> float:
        """Memory of one device that tensors can have."""
        return (self.memory_gib - self.reserved_gib) * _GIB

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster than in float32."""
        return self.tflops.bfloat16 > self.tflops.float32

    def flops(self, precision: Precision, *, solves: bool = False) -> float:
        """Return operations a second that are reached in `precision`."""
        share = self.achievable.solves if solves else self.achievable.products
        return 1e12 * share * float(getattr(self.tflops, precision))


def load_hardware(name: str, devices: int | None = None) -> Hardware:
    """Return the hardware of a name under `configs/hardware`, or of the path of a YAML file.

    `devices` takes the place of the file's number.

    Raises:
        ValueError: unknown, or the file says what it may not; one line each.
    """
    path = _path(name)
    data = read_mapping(path)
    if devices is not None:
        data["devices"] = devices
    try:
        return Hardware.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = complaints(Hardware, error, lambda _: str(path))
        raise ValueError("\n".join(lines)) from None


def known_hardware() -> list[str]:
    """Return the names under `configs/hardware`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _path(name: str) -> Path:
    known = known_hardware()
    if name in known:
        return FOLDER / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"hardware: got {name!r}; {hint}allowed: {', '.join(known)}, or the path of a YAML file"
    )
