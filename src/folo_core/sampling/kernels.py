"""Whether this machine can run the Triton kernels that samplers bring, asked without importing Triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Return whether logits on this type of device ("cpu", "cuda") can be sampled by Triton kernels."""
    return device_type == "cuda" and find_spec("triton") is not None
