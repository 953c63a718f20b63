"""The command `export`: the pruned model of a run, or any other model, for another engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.gguf import write_gguf
from pruning.registration import register_with_transformers
from pruning.shards import Shards
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder, is_run_folder
from selfpruner.workbench import settle_process

if TYPE_CHECKING:
    from pruning.gguf import FileType

_DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}


def export_gguf(source: str, out: Path | None, dtype: FileType, progress: Progress) -> str:
    """Write a model as a GGUF file; return what it is.

    `source` is a run, whose file lies in it unless `out` is given, or a Hugging Face folder.

    Raises:
        ValueError: the run is not finished, llama.cpp cannot hold the model, or `out` is no name
            of a GGUF file; one line.
        OSError: the file cannot be written.
    """
    model, path = _folder(source) or Path(source), out
    if path is None and is_run_folder(Path(source)):
        path = RunFolder.open(Path(source)).gguf
    if path is None or path.suffix != ".gguf" or path.is_dir():
        raise ValueError(f"--out: got {path}; allowed: a file whose name ends in .gguf")
    settle_process()
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"write {path.name}", len(Shards(model))) as advance:
        architecture = write_gguf(model, path, dtype, advance)
    return f"{path}: {dtype}, architecture {architecture}, {path.stat().st_size / 1e6:.1f} MB"


def export_hf(source: str, out: Path | None, dtype: str | None, progress: Progress) -> str:
    """Write a model as a Hugging Face folder, converted to `dtype`; return what it is.

    Without a dtype a folder, or that of a run, is copied as it is; what is no folder becomes
    bfloat16.

    Raises:
        ValueError: the run is not finished, there is no such model, `out` is taken or not given,
            or the dtype is none of a folder's; one line.
        OSError: the folder cannot be written.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype: got {dtype}; allowed with --to hf: {', '.join(_DTYPES)}")
    model = _folder(source)
    if out is None:
        there = "" if model is None else f"; {model} is a Hugging Face folder already"
        raise ValueError(f"--out: not given{there}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; choose another")
    settle_process()
    partly = out.with_name(f".{out.name}.partly")
    shutil.rmtree(partly, ignore_errors=True)
    with progress.stage(f"write {out.name}"):
        if model is not None and dtype is None:
            shutil.copytree(model, partly)
        else:
            _convert(source if model is None else str(model), partly, dtype or "bf16")
        partly.replace(out)  # an empty folder there gives way
    return f"{out}: {dtype or ('bf16' if model is None else 'as it was')}"


def _folder(source: str) -> Path | None:
    """Return the exported model of a run, or the folder that `source` is; None where it is none.

    Raises:
        ValueError: the run has no model yet.
    """
    path = Path(source)
    if not is_run_folder(path):
        return path if (path / "config.json").is_file() else None
    folder = RunFolder.open(path)
    if not folder.results.is_file() or not (folder.model / "config.json").is_file():
        raise ValueError(f"{folder.model}: missing; has the run finished?")
    return folder.model


def _convert(model: str, out: Path, dtype: str) -> None:
    import torch

    from pruning.export import export
    from pruning.loading import load

    register_with_transformers()
    wanted: torch.dtype = getattr(torch, _DTYPES[dtype])
    loaded, tokenizer = load(model, wanted)
    export(loaded, tokenizer, out, wanted)
    if (Path(model) / "README.md").is_file():
        shutil.copyfile(Path(model) / "README.md", out / "README.md")
        with (out / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\nThis copy was converted to {_DTYPES[dtype]} after all measurements.\n")
