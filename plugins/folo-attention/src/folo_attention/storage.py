"""Keys and values of every layer, in blocks of slots: what the backends of this distribution have in common.

Keys and values lie token-major (``[slots, kv_heads, head_size]``): a step's new tokens are written by one indexed copy,
and one sequence's consecutive blocks are a view. One slot more than the blocks have stays zero and is no sequence's:
entries past a sequence's end point to it, so that what a stale slot holds, even NaN, never takes part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from folo_attention.host import HostBlocks

if TYPE_CHECKING:
    from folo_core.attention.interface import KVCacheSpec


class PagedStorage:
    """Base of an ``AttentionBackend``: owns the blocks, and writes, copies, zeroes and gathers their slots."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._num_slots = 0
        self._block_size = 0
        self._device = torch.device("cpu")
        self._scratch: dict[str, torch.Tensor] = {}

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed ``[slots + 1, kv_heads, head_size]`` keys and values for each layer; the last stays zero."""
        self._num_slots = num_blocks * block_size
        self._block_size = block_size
        self._device = device
        for spec in specs:
            value_size = spec.head_size if spec.v_head_size is None else spec.v_head_size
            shape = (self._num_slots + 1, spec.num_kv_heads)
            self._keys.append(_zeros((*shape, spec.head_size), spec.dtype, device))
            self._values.append(_zeros((*shape, value_size), spec.dtype, device))

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer."""
        source, destination = self._slots_of(sources), self._slots_of(destinations)
        for cache in (*self._keys, *self._values):
            cache.index_copy_(0, destination, cache.index_select(0, source))

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        slots = self._slots_of(blocks)
        for cache in (*self._keys, *self._values):
            cache.index_fill_(0, slots, 0)

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks`` of all layers."""
        self._host = HostBlocks([*self._keys, *self._values], self._num_slots // self._block_size, num_blocks)

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it, in every layer."""
        self._host.store(device_blocks, host_blocks)

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it, in every layer."""
        self._host.load(host_blocks, device_blocks)

    def _write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens into their slots; return all keys and values of the layer."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def _gather(self, name: str, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Copies of slots; on a CPU in memory that the next tile reuses.

        The C allocator hands megabytes back to the system as soon as they are freed, and touching new ones page by
        page took three times as long as the attention itself. CUDA's caching allocator knows no such cost.
        """
        shape = (slots.numel(), *cache.shape[1:])
        return torch.index_select(cache, 0, slots, out=self._scratch_of(name, shape, cache.dtype))

    def _scratch_of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for a result that is used up before the next one of its name."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = math.prod(shape)
        scratch = self._scratch.get(name)
        if scratch is None or scratch.numel() < size or scratch.dtype != dtype:
            scratch = self._scratch[name] = torch.empty(size, dtype=dtype)
        return scratch[:size].view(shape)

    def _slots_of(self, blocks: list[int]) -> torch.Tensor:
        first = np.asarray(blocks, dtype=np.int64)[:, None] * self._block_size
        return torch.from_numpy((first + np.arange(self._block_size)).ravel()).to(self._device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU in memory that the system hands out as it is first written to.

    ``torch.zeros`` writes every byte, which takes seconds for a large pool and holds memory that may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    memory = np.zeros(size + alignment, dtype=np.uint8)
    start = -memory.ctypes.data % alignment
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
