"""Keeps resident memory flat while many arrays come and go."""

from __future__ import annotations

import contextlib
import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_INITIAL_BYTES = 128 * 1024  # glibc's own initial value


def keep_heap_flat() -> None:
    """Have glibc give large blocks back when they are freed, for the rest of the process.

    It does so at first, then raises the size that counts as large to that of the largest block
    freed; arrays then come from the heap, which fragments and never shrinks: a calibration's
    resident memory grew with its samples, although nothing is kept of them (`scripts/prove
    calibration-cost`). Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _INITIAL_BYTES)
