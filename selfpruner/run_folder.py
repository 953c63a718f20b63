"""The run folder: a contract of file names, written so that no reader ever sees half a file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfpruner.config import RunConfig
from selfpruner.environment import environment

_MARK = "selfpruner_run"
_AT_START = {"config.yaml", "environment.json", ".lock"}


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; it may be used wherever a path may, and `/` gives the paths in it."""

    path: Path

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
        *,
        replace: bool = False,
        threads: int | None = None,
    ) -> RunFolder:
        """Return a new folder that holds `config.yaml` and `environment.json`.

        Args:
            path: where; an empty folder there is taken as it is.
            config: the resolved configuration.
            replace: put aside what is there, if it is a run folder; `keep` then removes it, and
                `remove_if_unused` brings it back.
            threads: of torch that the search will have; None: as many as it has now.

        Raises:
            ValueError: something is there and `replace` is off, or it is no run folder.
            OSError: the folder cannot be written; a full disk is named as such.
        """
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"{path}: exists and is not a folder; choose another with --out")
        folder = cls(path)
        if path.exists() and any(path.iterdir()):
            _make_room(folder, replace)
        try:
            with _full_disk_named(path):
                path.mkdir(parents=True, exist_ok=True)
            facts = environment(config.seed, threads)
            folder.write_json("environment.json", {_MARK: 1, **facts})
            folder.write_text("config.yaml", config.to_yaml())
        except BaseException:  # a signal, too: nothing would go on with half a beginning
            folder.remove_if_unused()
            raise
        return folder

    @classmethod
    def begun(cls, path: Path, config: RunConfig) -> RunFolder:
        """Return the run folder at `path`, begun with `config` where there is none yet."""
        return cls.open(path) if is_run_folder(path) else cls.create(path, config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the existing run folder at `path`.

        Raises:
            ValueError: there is none.
        """
        if not is_run_folder(path):
            raise ValueError(f"{path}: not a run folder (no config.yaml and environment.json)")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this program out of the folder for the block.

        Raises:
            ValueError: one is at work in it.
        """
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self}: another process is at work in this folder") from None
            yield

    def keep(self) -> None:
        """Go on with this run for good: what it replaces is removed."""
        if is_run_folder(self._replaced):
            shutil.rmtree(self._replaced)

    def remove_if_unused(self) -> None:
        """Remove the folder again if nothing was added to it; what it was to replace is back."""
        if self._is_unused:
            self._take_back()

    def _take_back(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced.is_dir():
            self._replaced.rename(self.path)

    @property
    def replaced_bytes(self) -> int:
        """What `keep` gives back to the disk."""
        there = self._replaced.rglob("*") if is_run_folder(self._replaced) else ()
        return sum(x.stat().st_size for x in there if x.is_file() and not x.is_symlink())

    @property
    def _is_unused(self) -> bool:
        return not self.path.exists() or {x.name for x in self.path.iterdir()} <= _AT_START

    @property
    def _replaced(self) -> Path:
        """Where the run lies that this one is to replace."""
        return self.path.with_name(f".{self.path.name}.replaced")

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
    def order(self) -> Path:
        """Hash of the ranking that the plans of this run are read with."""
        return self.statistics / "order.json"

    @property
    def statistics(self) -> Path:
        """Folder of rankings and statistics."""
        return self.path / "statistics"

    @property
    def scratch(self) -> Path:
        """What a streamed run keeps on disk instead of in memory; gone when it has finished."""
        return self.path / "scratch"

    @property
    def plan(self) -> Path:
        """The plan of the pruned model."""
        return self.path / "plan.json"

    @property
    def model(self) -> Path:
        """Folder of the pruned model."""
        return self.path / "model"

    @property
    def gguf(self) -> Path:
        """The pruned model as one file for llama.cpp, where it was asked for."""
        return self.path / "model.gguf"

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
        return write_whole(self.path / name, text)

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


def write_whole(path: Path, text: str) -> Path:
    """Write a text file in one step (a new one takes the old one's place) and return its path.

    Raises:
        OSError: it cannot be written; a full disk is named as such.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _full_disk_named(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def is_run_folder(path: Path) -> bool:
    """Return whether `path` is a folder that `RunFolder.create` made."""
    try:
        mark = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and _MARK in mark and (path / "config.yaml").is_file()


def _hardly_began(path: Path) -> bool:
    """Return whether a run was killed there before it had its configuration."""
    names = {x.name for x in path.iterdir() if not x.name.endswith(".tmp")}
    mark = path / "environment.json"
    return names == {mark.name} and _MARK in mark.read_text("utf-8", errors="replace")


def _make_room(folder: RunFolder, replace: bool) -> None:
    """Put the run that is there aside, if allowed to; one that never began is simply removed."""
    path = folder.path
    if _hardly_began(path):
        folder._take_back()
        if not path.exists():
            return
    if not replace:
        raise ValueError(
            f"{path}: exists; `selfpruner resume {path}` goes on with a run that is there, "
            "--replace removes it, --out names another folder"
        )
    if not is_run_folder(path):
        raise ValueError(f"{path}: not a run folder, so --replace does not remove it")
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path}: holds the current folder, so --replace does not remove it")
    with folder.locked():
        if folder._is_unused:
            shutil.rmtree(path)
            return
        folder.keep()
        path.rename(folder._replaced)


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
