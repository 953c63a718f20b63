"""The heap of glibc: one for all threads, and what becomes of freed memory.

The graph runs its nodes in a thread, and glibc would give it a heap of its own. Memory that one
heap has freed is not used again by another, so two of them grow to the sum of their peaks: a
gigabyte more in the demo.

Every operation on tensors allocates its result. glibc gives freed memory back to the system, which
clears each page anew when it is touched again; on a CPU that takes as long as the operations do
(EXPERIMENTS.md). So it is kept, but in a streamed run: there large blocks lie beside the heap and
go back when they are freed, because a layer's tensors come and go and would leave gaps.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
_RETURNED = 256 * 2**10  # blocks of a streamed run from this size on lie beside the heap
_KEPT = 32 * 2**20  # smaller ones come from the heap elsewhere; glibc allows no more everywhere
_FREE = 128 * 2**20  # that the heap keeps at its end


def settle_heap(*, streaming: bool) -> None:
    """Set what this process does with freed memory from now on; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _RETURNED if streaming else _KEPT)
    if not streaming:
        mallopt(_M_TRIM_THRESHOLD, _FREE)
