"""What a process does with freed memory, seen by how often the system must hand out pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from selfpruner.heap import settle_heap

settle_heap(streaming=sys.argv[1] == "streaming")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    for _ in range(20):
        b"x" * 2**23
print(faults() - before)
"""


def _faults(way: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other heaps are left alone")
def test_a_streamed_run_returns_large_blocks() -> None:
    returned = _faults("streaming")
    assert returned >= 80  # blocks of 8 MiB, twenty times: even pages of 2 MiB are that many
    assert _faults("whole") < returned / 4
