"""The run folder: a contract of file names, written so that no reader ever sees half a file."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfpruner.config import RunConfig

_MARK = "selfpruner_run"

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


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; it may be used wherever a path may, and `/` gives the paths in it."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: RunConfig, *, replace: bool = False) -> RunFolder:
        """Return a new folder that holds `config.yaml` and `environment.json`.

        Args:
            path: where; an empty folder there is taken as it is.
            config: the resolved configuration.
            replace: first remove what is there, if it is a run folder.

        Raises:
            ValueError: something is there and `replace` is off, or it is no run folder.
            OSError: the folder cannot be written; a full disk is named as such.
        """
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"{path}: exists and is not a folder; choose another with --out")
        if path.exists() and any(path.iterdir()):
            _make_room(path, replace)
        with _full_disk_named(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_json("environment.json", environment(config.seed))
        folder.write_text("config.yaml", config.to_yaml())
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the existing run folder at `path`.

        Raises:
            ValueError: there is none.
        """
        if not is_run_folder(path):
            raise ValueError(f"{path}: not a run folder (no config.yaml and environment.json)")
        return cls(path)

    def remove_if_unused(self) -> None:
        """Remove the folder again if nothing was added to it, so that its name stays free."""
        if {path.name for path in self.path.iterdir()} <= {"config.yaml", "environment.json"}:
            shutil.rmtree(self.path)

    def __fspath__(self) -> str:
        """Return the folder as a path."""
        return str(self.path)

    def __str__(self) -> str:
        """Return the folder's path."""
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        """Return the path of `name` in the folder."""
        return self.path / name

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.yaml"

    @property
    def candidates(self) -> Path:
        """Ledger: one line a scored candidate."""
        return self.path / "candidates.jsonl"

    @property
    def llm(self) -> Path:
        """Ledger: one line an LLM attempt."""
        return self.path / "llm.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the search graph stood (SQLite)."""
        return self.path / "checkpoints.sqlite"

    @property
    def statistics(self) -> Path:
        """Folder of rankings and statistics."""
        return self.path / "statistics"

    @property
    def plan(self) -> Path:
        """The plan of the pruned model."""
        return self.path / "plan.json"

    @property
    def model(self) -> Path:
        """Folder of the pruned model."""
        return self.path / "model"

    @property
    def results(self) -> Path:
        """Every number of the report."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    def write_json(self, name: str, data: Any) -> Path:
        """Write `data` as `name` in one step and return its path; NaN and infinity are refused.

        Raises:
            ValueError: `data` is not plain JSON.
            OSError: it cannot be written; a full disk is named as such.
        """
        try:
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / name}: not plain JSON: {error}") from None
        return self.write_text(name, text + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` as `name` in one step (a new file takes the old one's place).

        Raises:
            OSError: it cannot be written; a full disk is named as such.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _full_disk_named(path):
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def read_json(self, name: str) -> Any:
        """Return the data of `name`.

        Raises:
            ValueError: it is missing or not JSON.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; has the run finished?") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None


def is_run_folder(path: Path) -> bool:
    """Return whether `path` is a folder that `RunFolder.create` made."""
    try:
        mark = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and _MARK in mark and (path / "config.yaml").is_file()


def environment(seed: int) -> dict[str, Any]:
    """Return what the numbers of a run depend on beside its configuration.

    Versions, Python, platform, CPU model, cores, memory in bytes, git revision or None, seed.
    No host name, user or path.
    """
    import psutil

    return {
        _MARK: 1,
        "seed": seed,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": int(psutil.virtual_memory().total),
        "git_revision": _git_revision(),
        "versions": dict(sorted(_versions())),
    }


def _make_room(path: Path, replace: bool) -> None:
    """Remove the run folder at `path`, if allowed to."""
    if not replace:
        raise ValueError(f"{path}: exists; give --replace to remove it, or another --out")
    if not is_run_folder(path):
        raise ValueError(f"{path}: not a run folder, so --replace does not remove it")
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path}: holds the current folder, so --replace does not remove it")
    shutil.rmtree(path)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Turn the system's words for a full disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full; could not write {path}"
        raise OSError(error.errno, message) from None


def _cpu_model() -> str:
    """Return the CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


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
