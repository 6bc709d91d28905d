"""Blocks on the host, and the copies there and back.

A block lies on the host as one run of bytes, all layers' keys before all layers' values. To get there, the blocks of a
step are gathered layer by layer into one buffer on the device, which is then copied in one piece for each run of
neighbouring host blocks: a few large copies instead of two for every block and layer. On CUDA the host's memory is
pinned and these copies have a stream of their own, so that the device computes on while they last; the buffer is all
that they read, so the blocks may be overwritten at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from folo_kernels.gpu.blocks import upload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BUFFER_BYTES = 64 * 2**20
"""Most bytes gathered at once: what a swap may take of a device that is short of memory already."""


class HostBlocks:
    """The host's copies of some blocks."""

    def __init__(self, caches: Sequence[torch.Tensor], num_device_blocks: int, num_blocks: int) -> None:
        """Allocate room for blocks 1 to ``num_blocks``.

        Args:
            caches: keys and values of all layers, ``[slots, heads, size]``, contiguous.
            num_device_blocks: how many blocks their slots form; slots beyond these are left alone.
            num_blocks: on the host; a host block 0, which nobody uses, comes on top, as on the device.
        """
        self._device = caches[0].device
        self._rows = [_as_rows(cache, num_device_blocks) for cache in caches]
        widths = [rows.shape[1] for rows in self._rows]
        self._offsets = np.cumsum([0, *widths]).tolist()
        self.block_bytes: int = self._offsets[-1]
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        shape = (num_blocks + 1, self.block_bytes)
        pinned = self._stream is not None
        # On a CPU the system hands memory out as it is first written to.
        self._memory = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pinned else _untouched(shape)
        self._most = max(1, BUFFER_BYTES // self.block_bytes)

    def store(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it."""
        for device, host in self._batches(device_blocks, host_blocks):
            index = upload(device, self._device)
            buffer = torch.empty((len(device), self.block_bytes), dtype=torch.uint8, device=self._device)
            for rows, begin, end in zip(self._rows, self._offsets, self._offsets[1:], strict=False):
                buffer[:, begin:end] = rows.index_select(0, index)
            self._exchange(buffer, host, to_host=True)

    def load(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it."""
        for device, host in self._batches(device_blocks, host_blocks):
            index = upload(device, self._device)
            buffer = torch.empty((len(device), self.block_bytes), dtype=torch.uint8, device=self._device)
            self._exchange(buffer, host, to_host=False)
            for rows, begin, end in zip(self._rows, self._offsets, self._offsets[1:], strict=False):
                rows.index_copy_(0, index, buffer[:, begin:end])

    def _batches(self, device_blocks: list[int], host_blocks: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        for start in range(0, len(device_blocks), self._most):
            yield device_blocks[start : start + self._most], host_blocks[start : start + self._most]

    def _exchange(self, buffer: torch.Tensor, host_blocks: list[int], *, to_host: bool) -> None:
        """Copy between the buffer's rows and these host blocks, on CUDA behind what the device has been asked to do."""
        if self._stream is None:
            self._copy(buffer, host_blocks, to_host=to_host)
            return
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            self._copy(buffer, host_blocks, to_host=to_host)
        buffer.record_stream(self._stream)
        if not to_host:
            main.wait_stream(self._stream)

    def _copy(self, buffer: torch.Tensor, host_blocks: list[int], *, to_host: bool) -> None:
        for first, last in _runs(host_blocks):
            host = self._memory[host_blocks[first] : host_blocks[first] + last - first]
            if to_host:
                host.copy_(buffer[first:last], non_blocking=True)
            else:
                buffer[first:last].copy_(host, non_blocking=True)


def _as_rows(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """View ``[slots, heads, size]`` as uint8 ``[num_blocks, bytes of a block in this layer]``."""
    slots = cache.shape[0] // num_blocks * num_blocks
    return cache[:slots].view(num_blocks, -1).view(torch.uint8)


def _untouched(shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.zeros(shape, dtype=np.uint8))


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a list into ``(first, last)`` places of runs in which each number is one more than that before it."""
    first = 0
    for place in range(1, len(blocks) + 1):
        if place == len(blocks) or blocks[place] != blocks[place - 1] + 1:
            yield first, place
            first = place
