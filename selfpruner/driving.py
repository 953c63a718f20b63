"""From a configuration to the driver that proposes plans."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent.drivers.chain import ChainDriver
from agent.drivers.driver import Driver
from agent.settings import Endpoint
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_drivers(chain: Sequence[Endpoint]) -> None:
    """Refuse drivers that cannot be opened, before anything is computed.

    Raises:
        ValueError: a model, a recording or the program of a vLLM server is not there, or there can
            be no such address or key; one line.
    """
    for number, settings in enumerate(chain):
        try:
            _check_driver(settings)
        except ValueError as error:
            if number == 0:
                raise
            place, text = f"driver.fallbacks.{number - 1}", str(error)
            here = text.startswith("driver.")
            raise ValueError(
                f"{place}{text.removeprefix('driver')}" if here else f"{place}: {text}"
            ) from None


def _check_driver(settings: Endpoint) -> None:
    """Refuse a driver that cannot be opened, as if it were the first."""
    if settings.kind in ("embedded", "vllm") and settings.model is not None:
        _check_model(settings.model)
    if settings.kind == "api":
        _check_endpoint(settings)
    if settings.kind == "replay":
        _replay(settings)
    if settings.kind == "vllm":
        _check_server(settings)


def _check_server(settings: Endpoint) -> None:
    """Refuse a server that is neither there, at the port that is named, nor can be started."""
    from agent.drivers.vllm_server import is_healthy

    wanted = settings.python or "vllm"
    is_there = settings.port is not None and is_healthy(settings.port)
    if not is_there and not shutil.which(wanted):
        raise ValueError(
            f"driver.python: {wanted}: no such program; `make venv-vllm` builds an "
            "environment with vLLM, driver.python is its interpreter"
        )


def _check_endpoint(settings: Endpoint) -> None:
    from httpx2 import URL, InvalidURL

    from agent.drivers.api import key_of

    key_of(settings)
    try:
        URL(str(settings.base_url))
    except InvalidURL as error:
        raise ValueError(f"driver.base_url: got {settings.base_url!r}; {error}") from None


def _check_model(name: str) -> None:
    from pruning.loading import locate

    try:
        locate(name)
    except ValueError as error:
        raise ValueError(f"driver.{error}") from None


def open_driver(
    bench: Workbench, chain: Sequence[Endpoint], folder: RunFolder, progress: Progress
) -> ChainDriver:
    """Return the drivers of `chain`; each is opened when it is first asked."""
    kinds: dict[str, Callable[[Endpoint], Driver]] = {
        "embedded": lambda x: _embedded(bench, x),
        "api": lambda x: _api(x, folder),
        "vllm": lambda x: _vllm(bench, folder, progress, x),
        "replay": lambda x: _replay(x, folder.llm),
    }
    return ChainDriver([partial(kinds[x.kind], x) for x in chain], chain)


def _embedded(bench: Workbench, settings: Endpoint) -> Driver:
    from agent.drivers.embedded import EmbeddedDriver

    model, tokenizer = _loaded(bench, settings)
    return EmbeddedDriver(model, tokenizer, settings.model or bench.config.model, settings.batch)


def _api(settings: Endpoint, folder: RunFolder) -> Driver:
    from agent.drivers.api import ApiDriver, key_of

    address, key = str(settings.base_url), key_of(settings)
    return ApiDriver(
        settings,
        base_url=address,
        model=settings.model,
        key=key,
        has_answered=_has_answered(folder),
    )


def _replay(settings: Endpoint, given: Path | None = None) -> Driver:
    from agent.drivers.replay import ReplayDriver

    return ReplayDriver(Path(str(settings.recording)), given)


def _vllm(bench: Workbench, folder: RunFolder, progress: Progress, settings: Endpoint) -> Driver:
    from agent.drivers.vllm import VllmDriver
    from agent.drivers.vllm_server import VllmServer

    served = _served_folder(bench, folder, settings)
    server = VllmServer(
        str(served),
        folder / "vllm.log",
        python=settings.python,
        port=settings.port,
        eager=settings.eager,
        gpu_share=settings.gpu_share,
        max_model_len=_context(settings, served),
    )
    with progress.stage("vLLM server") as advance:
        return VllmDriver(
            settings, server, on_wait=lambda _: advance(0), has_answered=_has_answered(folder)
        )


def _has_answered(folder: RunFolder) -> bool:
    """Return whether a driver has answered in this run before."""
    from agent.ledger import read_lines

    return folder.llm.is_file() and any(x.reply is not None for x in read_lines(folder.llm))


def _loaded(
    bench: Workbench, settings: Endpoint
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the driver's model: the one that is pruned, or another one."""
    from pruning.loading import load

    if settings.model is None or settings.model == bench.config.model:
        return bench.model, bench.tokenizer
    return load(
        settings.model,
        bench.model.dtype,
        str(bench.model.device),
        trust_remote_code=bench.config.trust_remote_code,
    )


def _served_folder(bench: Workbench, folder: RunFolder, settings: Endpoint) -> Path:
    """Return what vLLM can serve: a folder as it is, anything else written to the run folder."""
    name = settings.model or bench.config.model
    if (Path(name) / "config.json").is_file():
        return Path(name)
    path = folder / "driver" / _slug(name)
    if not (path / "config.json").is_file():
        model, tokenizer = _loaded(bench, settings)
        partly = path.with_name(f"{path.name}.partly")
        shutil.rmtree(partly, ignore_errors=True)
        model.save_pretrained(partly)
        tokenizer.save_pretrained(partly)
        partly.rename(path)
    return path


def _slug(name: str) -> str:
    """Return a name for a folder: of a file, its own and what tells its place from others."""
    if not Path(name).is_file():
        return name.replace("/", "--")
    place = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:8]
    return f"{Path(name).stem}-{place}"


def _context(settings: Endpoint, served: Path) -> int:
    """Return the tokens of prompt and reply: as asked, at most what `config.json` tells."""
    config = json.loads((served / "config.json").read_text(encoding="utf-8"))
    most = config.get("max_position_embeddings")
    return min(settings.context, most) if isinstance(most, int) else settings.context
