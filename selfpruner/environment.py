"""What the numbers of a run depend on beside its configuration: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_REPORTED_PACKAGES = (
    "selfpruner",
    "torch",
    "transformers",
    "lm_eval",
    "datasets",
    "numpy",
    "safetensors",
    "langgraph",
    "xgrammar",
    "pydantic",
)


def environment(seed: int, threads: int | None = None) -> dict[str, Any]:
    """Return what the numbers of a run depend on beside its configuration.

    Versions, Python, platform, CPU model, cores, threads of torch (as given, or those it has now),
    GPU models, memory in bytes, git revision or None, seed. No host name, user or path.
    """
    import psutil
    import torch

    return {
        "seed": seed,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": threads or torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_bytes": int(psutil.virtual_memory().total),
        "git_revision": _git_revision(),
        "versions": dict(sorted(_versions())),
    }


def usable_cores() -> int:
    """Return how many cores this process may use: fewer than there are where it is held to some."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not a Linux
        return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Return what timings on a device depend on: the name of the CPU or the GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_model() if device.type == "cpu" else f"{device.type}, {_cpu_model()}"


def gpu_driver() -> str | None:
    """Return what the kernel says of NVIDIA's driver, None where it says nothing."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").splitlines()[0] if path.is_file() else None


def package_version(name: str) -> str:
    """Return the version of an installed package."""
    return importlib.metadata.version(name)


def cpu_instructions() -> str:
    """Return the instruction sets of the CPU in the system's words, "" where it has none.

    Rented CPUs of different generations go by one name.
    """
    return _cpu_line("flags", "Features") or ""


def _cpu_model() -> str:
    """Return the CPU's name as the system gives it."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_line(*names: str) -> str | None:
    """Return what the system says of the first CPU under one of these names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(names)), None)


def _git_revision() -> str | None:
    """Return the checkout's commit, `+` added when files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[1]
    try:
        revision = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _versions() -> Iterator[tuple[str, str]]:
    """Yield name and version of each reported package that is installed."""
    for name in _REPORTED_PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
