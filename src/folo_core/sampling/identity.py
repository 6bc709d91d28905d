"""The parents of a step in which every row goes on as itself, made once per number of rows."""

from __future__ import annotations

import functools

import torch

_MOST_SIZES = 1024


@functools.lru_cache(maxsize=_MOST_SIZES)
def identity(rows: int, device: torch.device) -> torch.Tensor:
    """Return 0 to ``rows - 1``, int64 ``[rows]``, on ``device``. It is shared: never write to it.

    The first call for a size allocates, so make it before a CUDA graph is captured, as a warm-up step does.
    """
    with torch.inference_mode(mode=False):
        return torch.arange(rows, device=device)
