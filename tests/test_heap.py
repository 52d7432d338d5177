"""Freed blocks go back to the system once the heap is kept flat."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np, psutil
from meancache_trt.heap import keep_heap_flat
if sys.argv[1] == "flat":
    keep_heap_flat()
np.ones(2**21)                        # freed: without it glibc now keeps blocks of this size
kept = []
for _ in range(300):                  # small arrays that stay, between large ones that go
    large = [np.ones(40_000) for _ in range(4)]
    kept.append(np.ones(100))
    del large
before = psutil.Process().memory_info().rss
blocks = [np.ones(40_000) for _ in range(200)]
pins = [np.ones(100) for _ in range(200)]
top = np.ones(10_000)                 # small enough for the heap: its end stays in use
del blocks
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_arrays_leave_the_process() -> None:
    def grown(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown("flat") < 4 * 2**20  # of 64 MB that were freed
    assert grown("as it is") > 16 * 2**20  # what the program shows otherwise
