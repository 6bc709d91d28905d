"""Keys and values of all layers in blocks on a device, and batched copies of blocks that never wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

COPY_BYTES = 256 * 2**20
"""Most bytes of blocks that are gathered at once before they are written: what a copy may take of a full device."""


@attrs.frozen(slots=True, kw_only=True)
class LayerShape:
    """One layer's keys and values of a token."""

    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    key_scale: float = 1.0
    """What stored keys are multiplied by when they are read, and new ones divided by; other than 1 for float8."""
    value_scale: float = 1.0


def upload(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Copy numbers into a tensor on the device without waiting for the device.

    Torch's allocator of pinned memory keeps the source until the copy has run.
    """
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


class DeviceBlocks:
    """KV blocks of every layer. Block 0 is the null block: padding rows of a step write to it.

    Keys and values of one shape lie in one tensor over all layers, so that copying blocks takes two launches per
    shape, however many layers there are.
    """

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed blocks for each layer."""
        self.shapes = list(shapes)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        kinds = [(s.kv_heads, size, s.dtype) for s in shapes for size in (s.key_size, s.value_size)]
        self._pools = {kind: _pool(kinds.count(kind), num_blocks, block_size, kind, device) for kind in set(kinds)}
        taken = dict.fromkeys(self._pools, 0)
        caches = []
        for kind in kinds:
            caches.append(self._pools[kind][taken[kind]])
            taken[kind] += 1
        self.keys: list[torch.Tensor] = caches[0::2]
        """``[num_blocks, kv_heads, block_size, key_size]`` for each layer."""
        self.values: list[torch.Tensor] = caches[1::2]
        """``[num_blocks, kv_heads, block_size, value_size]`` for each layer."""

    def tensors(self) -> list[torch.Tensor]:
        """All layers' keys, then all layers' values; the first dimension is the block."""
        return [*self.keys, *self.values]

    def pools(self) -> list[torch.Tensor]:
        """All keys and values of one shape in one tensor each: ``[layers, num_blocks, kv_heads, block_size, size]``.

        Float8 are seen as integers, which can be moved by index.
        """
        return [_as_numbers(pool) for pool in self._pools.values()]

    def bytes_per_block(self) -> int:
        """Bytes that one block takes over all layers."""
        return sum(cache[0].numel() * cache.element_size() for cache in self.tensors())

    def copy(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy whole blocks in every layer; all sources are read before any destination is written."""
        if not sources:
            return
        if set(sources) & set(destinations):
            self._copy(sources, destinations)
            return
        most = max(1, COPY_BYTES // self.bytes_per_block())
        for first in range(0, len(sources), most):
            self._copy(sources[first : first + most], destinations[first : first + most])

    def zero(self, blocks: Sequence[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        if not blocks:
            return
        index = upload(blocks, self.device)
        for pool in self.pools():
            pool.index_fill_(1, index, 0)

    def _copy(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        source, destination = upload([*sources, *destinations], self.device).split(len(sources))
        for pool in self.pools():
            pool.index_copy_(1, destination, pool.index_select(1, source))


def _pool(
    count: int, num_blocks: int, block_size: int, kind: tuple[int, int, torch.dtype], device: torch.device
) -> torch.Tensor:
    kv_heads, size, dtype = kind
    return torch.zeros((count, num_blocks, kv_heads, block_size, size), dtype=dtype, device=device)


def _as_numbers(pool: torch.Tensor) -> torch.Tensor:
    """See float8 as integers, as wide as a head's features fill: torch moves no float8 by index."""
    if pool.element_size() > 1:
        return pool
    return pool.view(torch.int64 if pool.shape[-1] % 8 == 0 else torch.uint8)
