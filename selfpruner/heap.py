"""The heap of glibc: one for all threads, and in a streamed run large blocks beside it.

The graph runs its nodes in a thread, and glibc would give it a heap of its own. Memory that one
heap has freed is not used again by another, so two of them grow to the sum of their peaks: a
gigabyte more in the demo.

Blocks beside the heap go back to the system when they are freed; glibc puts ever larger ones into
the heap (up to 32 MiB), where they leave gaps. A streamed run frees a layer's tensors all the time.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc
_LARGE = 256 * 2**10


def settle_heap(*, streaming: bool) -> None:
    """Set how this process allocates from now on; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    if streaming:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
