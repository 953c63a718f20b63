"""One heap for all threads: the graph runs its nodes in a thread, and glibc would give it another.

Memory that one heap has freed is not used again by another, so two of them grow to the sum of
their peaks: a gigabyte more in the demo.
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h of glibc


def share_heap() -> None:
    """Have threads that start from now on allocate where the first does; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
