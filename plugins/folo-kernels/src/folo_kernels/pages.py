"""Memory for what a step reads all of: weights, keys and values."""

from __future__ import annotations

import mmap

import numpy as np


def huge(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return zeroed bytes, in large pages where the system grants them, handed out as they are first written to."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
