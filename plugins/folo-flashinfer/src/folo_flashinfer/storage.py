"""Keys and values of every layer, in pages as FlashInfer reads them, and their copies on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folo_core.attention.interface import KVCacheSpec

HEAD_SIZES = (64, 128, 256)
"""Sizes of heads for which FlashInfer's kernels are made."""


class Pool:
    """Blocks of all layers, ``[num_blocks, block_size, kv_heads, head_size]`` each for keys and for values."""

    def __init__(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed blocks.

        Raises:
            ConfigError: FlashInfer has no kernels for the model's heads.
        """
        for spec in specs:
            _check(spec)
        shapes = [((num_blocks, block_size, spec.num_kv_heads, spec.head_size), spec.dtype) for spec in specs]
        self.device = device
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self._host: list[torch.Tensor] = []

    def tensors(self) -> list[torch.Tensor]:
        """All layers' keys, then all layers' values; the first dimension is the block."""
        return [*self.keys, *self.values]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new tokens ``[tokens, kv_heads, head_size]`` into their slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer; all sources are read before any destination is written."""
        source, destination = self._index(sources), self._index(destinations)
        for cache in self.tensors():
            cache.index_copy_(0, destination, cache.index_select(0, source))

    def zero(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        index = self._index(blocks)
        for cache in self.tensors():
            cache.index_fill_(0, index, 0)

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks``; block 0 comes on top, as on the device."""
        pinned = self.device.type == "cuda"
        self._host = [
            torch.zeros((num_blocks + 1, *cache.shape[1:]), dtype=cache.dtype, pin_memory=pinned)
            for cache in self.tensors()
        ]

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it.

        The blocks are gathered first, so that they may be overwritten while the copies are under way.
        """
        index = self._index(device_blocks)
        for cache, host in zip(self.tensors(), self._host, strict=True):
            gathered = cache.index_select(0, index)
            for first, last in runs(host_blocks):
                begin = host_blocks[first]
                host[begin : begin + last - first].copy_(gathered[first:last], non_blocking=True)

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it."""
        index = self._index(device_blocks)
        for cache, host in zip(self.tensors(), self._host, strict=True):
            gathered = cache.new_empty((len(host_blocks), *cache.shape[1:]))
            for first, last in runs(host_blocks):
                begin = host_blocks[first]
                gathered[first:last].copy_(host[begin : begin + last - first], non_blocking=True)
            cache.index_copy_(0, index, gathered)

    def _index(self, blocks: list[int]) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64).to(self.device)


def runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a list into ``(first, last)`` places of runs in which each number is one more than that before it."""
    first = 0
    for place in range(1, len(blocks) + 1):
        if place == len(blocks) or blocks[place] != blocks[place - 1] + 1:
            yield first, place
            first = place


def _check(spec: KVCacheSpec) -> None:
    sizes = {spec.head_size, spec.head_size if spec.v_head_size is None else spec.v_head_size}
    if len(sizes) > 1 or spec.head_size not in HEAD_SIZES:
        shown = " and ".join(map(str, sorted(sizes)))
        raise ConfigError(
            f"attention: 'flashinfer': the model's heads have {shown} numbers, and its kernels take keys and values of "
            f"{', '.join(map(str, HEAD_SIZES))} alike: leave attention 'auto'"
        )
