"""The command `export`: the pruned model of a run, written for another engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.gguf import write_gguf
from pruning.registration import register_with_transformers
from pruning.shards import Shards
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import settle_process

if TYPE_CHECKING:
    from pruning.gguf import FileType

_FLOATS = {"f32": "float32", "f16": "float16"}


def export_gguf(folder: RunFolder, out: Path | None, dtype: FileType, progress: Progress) -> str:
    """Write the run's model as a GGUF file (`out`, or model.gguf in the run); return what it is.

    Raises:
        ValueError: the run is not finished, llama.cpp cannot hold the model, or `out` is no
            name of a GGUF file; one line.
        OSError: the file cannot be written.
    """
    model, path = _model(folder), out or folder.gguf
    if path.suffix != ".gguf" or path.is_dir():
        raise ValueError(f"--out: got {path}; allowed: a file whose name ends in .gguf")
    settle_process()
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"write {path.name}", len(Shards(model))) as advance:
        architecture = write_gguf(model, path, dtype, advance)
    return f"{path}: {dtype}, architecture {architecture}, {path.stat().st_size / 1e6:.1f} MB"


def export_hf(
    folder: RunFolder, out: Path | None, dtype: FileType | None, progress: Progress
) -> str:
    """Write the run's model as a Hugging Face folder, converted to `dtype`; return what it is.

    Without a dtype the folder is copied as it is.

    Raises:
        ValueError: the run is not finished, `out` is taken or not given, or the dtype is none
            of a folder's; one line.
        OSError: the folder cannot be written.
    """
    model = _model(folder)
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"--dtype: got {dtype}; allowed with --to hf: {', '.join(_FLOATS)}")
    if out is None:
        raise ValueError(f"--out: not given; {model} is a Hugging Face folder already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; choose another")
    settle_process()
    with progress.stage(f"write {out.name}"):
        if dtype is None:
            shutil.copytree(model, out, dirs_exist_ok=True)
        else:
            _convert(model, out, dtype)
    return f"{out}: {dtype or 'as in the run'}"


def _model(folder: RunFolder) -> Path:
    """Return the exported model of a run.

    Raises:
        ValueError: there is none yet.
    """
    if not folder.results.is_file() or not (folder.model / "config.json").is_file():
        raise ValueError(f"{folder.model}: missing; has the run finished?")
    return folder.model


def _convert(model: Path, out: Path, dtype: FileType) -> None:
    import torch

    from pruning.export import export
    from pruning.loading import load

    register_with_transformers()
    wanted: torch.dtype = getattr(torch, _FLOATS[dtype])
    loaded, tokenizer = load(str(model), wanted)
    export(loaded, tokenizer, out, wanted)
    if (model / "README.md").is_file():
        shutil.copyfile(model / "README.md", out / "README.md")
