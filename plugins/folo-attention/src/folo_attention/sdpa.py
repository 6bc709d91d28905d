"""Paged attention with PyTorch's own operators, on any device.

Keys and values lie token-major (``[slots, kv_heads, head_size]``), so that a step's new tokens are written by one
indexed copy, and consecutive blocks of a sequence are read in place as one strided view, without a gather.
Query heads that share a key head form a dimension of their own, and keys are broadcast over it with stride 0: grouped
queries repeat nothing in memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    import numpy as np

    from folo_core.attention.interface import AttentionMetadata, KVCacheSpec

QUERY_TILE = 256
"""Longest run of one sequence's new tokens attended at once; bounds the mask, and skips keys that lie ahead."""


@attrs.define(slots=True)
class _Tile:
    """A run of one sequence's new tokens, and the cached tokens they may see."""

    rows: slice
    """Packed rows of the queries."""
    keys: slice | torch.Tensor
    """Slots when the blocks are consecutive, else the blocks to gather."""
    skip: int
    """Gathered tokens to drop at the front."""
    num_keys: int
    mask: torch.Tensor | None
    """Bool ``[queries, keys]``, True where a key is seen; None if all are."""


class SdpaBackend:
    """``AttentionBackend`` over ``torch.nn.functional.scaled_dot_product_attention``."""

    wants_device_metadata = False

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._block_size = 0
        self._device = torch.device("cpu")

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed ``[num_blocks * block_size, kv_heads, head_size]`` keys and values for each layer."""
        slots = num_blocks * block_size
        for spec in specs:
            value_size = spec.head_size if spec.v_head_size is None else spec.v_head_size
            shape = (slots, spec.num_kv_heads)
            self._keys.append(torch.zeros(*shape, spec.head_size, dtype=spec.dtype, device=device))
            self._values.append(torch.zeros(*shape, value_size, dtype=spec.dtype, device=device))
        self._block_size = block_size
        self._device = device

    def plan(self, metadata: AttentionMetadata) -> dict[int | None, list[_Tile]]:
        """Tiles for each sliding window, made when a layer first asks for its window."""
        del metadata
        return {}

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values into their slots, then attend causally (see ``AttentionBackend``)."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, metadata.slot_mapping, key)
        values.index_copy_(0, metadata.slot_mapping, value)
        plan: dict[int | None, list[_Tile]] = metadata.plan
        if sliding_window not in plan:
            plan[sliding_window] = self._tiles(metadata, sliding_window)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for tile in plan[sliding_window]:
            k, v = self._read(keys, tile), self._read(values, tile)
            output[tile.rows] = _attend(query[tile.rows], k, v, tile.mask, scale, softcap)
        return output

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer."""
        source = torch.tensor(sources, dtype=torch.int64, device=self._device)
        destination = torch.tensor(destinations, dtype=torch.int64, device=self._device)
        for cache in (*self._keys, *self._values):
            blocks = cache.view(-1, self._block_size, *cache.shape[1:])
            blocks.index_copy_(0, destination, blocks.index_select(0, source))

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._device)
        for cache in (*self._keys, *self._values):
            cache.view(-1, self._block_size, *cache.shape[1:]).index_fill_(0, index, 0)

    def _tiles(self, metadata: AttentionMetadata, window: int | None) -> list[_Tile]:
        tiles = []
        for i, total in enumerate(metadata.seq_lens.tolist()):
            start, end = int(metadata.query_start[i]), int(metadata.query_start[i + 1])
            past = total - (end - start)
            for first in range(start, end, QUERY_TILE):
                last = min(first + QUERY_TILE, end)
                rows = slice(first, last)
                tiles.append(self._tile(metadata.block_tables[i], rows, past + first - start, window))
        return tiles

    def _tile(self, table: np.ndarray, rows: slice, position: int, window: int | None) -> _Tile:
        """The tile whose first query stands at ``position`` of its sequence."""
        size, num_queries = self._block_size, rows.stop - rows.start
        end = position + num_queries
        begin = 0 if window is None else max(0, position - window + 1)
        first_block = begin // size
        blocks = table[first_block : -(-end // size)]
        skip = begin - first_block * size
        mask = _causal_mask(num_queries, position - begin, window, self._device)
        if int(blocks[-1]) - int(blocks[0]) == len(blocks) - 1 and bool((blocks[1:] > blocks[:-1]).all()):
            slot = int(blocks[0]) * size + skip
            return _Tile(rows, slice(slot, slot + end - begin), 0, end - begin, mask)
        index = torch.from_numpy(blocks.astype("int64")).to(self._device)
        return _Tile(rows, index, skip, end - begin, mask)

    def _read(self, cache: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """``[num_keys, kv_heads, head_size]``: exactly the keys seen, so that no stale slot takes part."""
        if isinstance(tile.keys, slice):
            return cache[tile.keys]
        blocks = cache.view(-1, self._block_size, *cache.shape[1:]).index_select(0, tile.keys)
        return blocks.flatten(0, 1)[tile.skip : tile.skip + tile.num_keys]


def _causal_mask(num_queries: int, past: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool ``[num_queries, past + num_queries]``; None if each query sees every key."""
    if num_queries == 1:
        return None
    query = torch.arange(past, past + num_queries, device=device)[:, None]
    key = torch.arange(past + num_queries, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of ``query [n, heads, size]`` over ``key, value [m, kv_heads, size]``."""
    num_queries, num_heads, _ = query.shape
    groups = num_heads // key.shape[1]
    q = query.unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
    k = key.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    v = value.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    if softcap is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = _softcapped(q, k, v, mask, scale, softcap)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, -1)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """Attention with ``softcap * tanh(scores / softcap)``, as Gemma 2 (arXiv:2408.00118, section 2) defines it."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * (scale / softcap)
    scores = torch.tanh(scores) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
