"""Whether this machine can run the kernels of ``folo_sampling.device``, asked without importing what they need."""

from __future__ import annotations

import functools
from importlib.util import find_spec


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Return whether logits on this type of device ("cpu", "cuda") are sampled by Triton kernels."""
    return device_type == "cuda" and find_spec("triton") is not None
