"""Copies between host and device that nobody waits for.

Ordinary memory is copied through a buffer of the driver's, and the caller waits for that; pinned memory is not. Torch
keeps pinned memory that is still being read out of use, so a fresh buffer for every copy costs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on ``device``: on a CPU the same memory, else a copy that may be under way."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host; from CUDA a copy that is complete once the device has come that far."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Milestone:
    """A place in the device's work that can be waited for; on a CPU all work is done when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the device has done what it was asked to do before this was made."""
        if self._event is not None:
            self._event.synchronize()
