"""What all engines need."""

from __future__ import annotations

import pytest
import torch

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
