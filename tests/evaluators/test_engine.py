"""What all engines need."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from evaluators import engine_llama_cpp
from evaluators.engine import SkipError, check_room, free_bytes


def test_what_torch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU of 80 bytes: 30 free, 40 kept by this process, 15 of them in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 15)
    assert free_bytes("cuda") == 30 + 40 - 15


def test_a_cache_leaves_room_for_activations() -> None:
    check_room(80, 100)
    with pytest.raises(SkipError, match="KV cache takes"):
        check_room(81, 100)


def test_the_memory_of_the_last_case_is_free_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp: a case that is served is not asked to fit beside itself."""
    served: list[weakref.ref[Any]] = []

    class Server:
        def __init__(self, _: Any) -> None:
            served.append(weakref.ref(self))

    def free(_: str) -> int:
        return 100 if all(x() is None for x in served) else 0

    stand_in = SimpleNamespace(Server=Server, CommonParams=MagicMock)
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)
    monkeypatch.setattr(engine_llama_cpp, "free_bytes", free)
    monkeypatch.setattr(engine_llama_cpp.LlamaCppEngine, "_cached_bytes", lambda _: 1)
    engine = engine_llama_cpp.LlamaCppEngine({"model": "m", "threads": 1})
    for batch, tokens in ((1, 70), (1, 70), (1, 80)):
        engine._serve(batch, tokens)
    assert len(served) == 3  # one for each case
    with pytest.raises(SkipError):
        engine._serve(1, 81)
    engine._serve(1, 80)
    assert len(served) == 4
