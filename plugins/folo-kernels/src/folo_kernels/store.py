"""Keys and values of all layers in blocks, and attention over them where they lie."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_kernels import library as native
from folo_kernels.pages import huge

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE_ROWS = 48
"""Query rows (tokens times heads that share a key head) that one thread takes at a time, at most."""


@attrs.frozen(slots=True, kw_only=True)
class LayerShape:
    """One layer's keys and values of a token."""

    kv_heads: int
    key_size: int
    value_size: int


class PackedStep:
    """One step's packed batch, in the kernels' own form. Keeps alive what it points to."""

    def __init__(
        self,
        query_start: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slots: torch.Tensor,
        group: int,
    ) -> None:
        """Plan which query rows are attended to together.

        Args:
            query_start: int32 ``[num_seqs + 1]``: a sequence's new tokens are ``query_start[i]:query_start[i + 1]``.
            seq_lens: int32 ``[num_seqs]``: tokens to attend over, the new ones included.
            block_tables: int32 ``[num_seqs, width]``.
            slots: int64 ``[num_tokens]``: where each new token's key and value go.
            group: largest number of query heads that share a key head.
        """
        self._arrays = [np.ascontiguousarray(array, dtype=np.int32) for array in (query_start, seq_lens, block_tables)]
        self._slots = slots
        self._tiles = tiles(self._arrays[0], max(1, TILE_ROWS // group))
        starts, lens, tables = self._arrays
        self.num_tokens = slots.shape[0]
        self.native = native.Step(
            num_tokens=self.num_tokens,
            num_seqs=len(lens),
            table_width=tables.shape[1],
            num_tiles=len(self._tiles),
            query_start=starts.ctypes.data,
            seq_lens=lens.ctypes.data,
            block_tables=tables.ctypes.data,
            slots=slots.data_ptr(),
            tiles=self._tiles.ctypes.data,
        )


def tiles(query_start: NDArray[np.int32], most: int) -> NDArray[np.int32]:
    """Cut each sequence's new tokens into runs of at most ``most``: int32 ``[tiles, 3]``: sequence, first, last.

    Runs that end latest come first: they see the most keys, and threads should not wait for one of them at the end.
    """
    counts = np.diff(query_start)
    if (counts == 1).all():
        rows = np.arange(len(counts), dtype=np.int32)
        return np.stack([rows, query_start[:-1], query_start[1:]], axis=1)
    found = [
        (sequence, first, min(first + most, end))
        for sequence, (start, end) in enumerate(zip(query_start[:-1].tolist(), query_start[1:].tolist(), strict=True))
        for first in range(start, end, most)
    ]
    return np.array(found[::-1], dtype=np.int32).reshape(-1, 3)


class BlockStore:
    """KV blocks of every layer.

    Keys of a block lie feature by feature and values token by token, head by head, so that a block is a panel that all
    queries of a head's group are multiplied with as it is. Block 0 belongs to nobody.
    """

    def __init__(self, shapes: list[LayerShape], num_blocks: int, block_size: int) -> None:
        """Allocate zeroed blocks; the system hands out their memory as it is first written to."""
        self._library = native.load()
        lanes = self._library.vector_lanes
        room = -(-block_size // lanes) * lanes
        self.block_size = block_size
        self.group = 1
        """Most query heads that share a key head, as far as known: what a step's tiles should be cut for."""
        self.shapes = shapes
        self.keys: list[torch.Tensor] = []
        """Float32 ``[num_blocks, kv_heads, key_size, block_size rounded up to whole vectors]`` for each layer."""
        self.values: list[torch.Tensor] = []
        """Float32 ``[num_blocks, kv_heads, block_size, value_size rounded up to whole vectors]`` for each layer."""
        self.native = (native.Store * len(shapes))()
        for index, shape in enumerate(shapes):
            value_room = -(-shape.value_size // lanes) * lanes
            self.keys.append(_zeros(num_blocks, shape.kv_heads, shape.key_size, room))
            self.values.append(_zeros(num_blocks, shape.kv_heads, block_size, value_room))
            self.native[index] = native.Store(
                keys=self.keys[-1].data_ptr(),
                values=self.values[-1].data_ptr(),
                kv_heads=shape.kv_heads,
                key_size=shape.key_size,
                value_size=shape.value_size,
                block_size=block_size,
                block_room=room,
                value_room=value_room,
            )

    def tensors(self) -> list[torch.Tensor]:
        """All layers' keys and values; the first dimension is the block."""
        return [*self.keys, *self.values]

    def write(self, layer: int, step: PackedStep, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``[num_tokens, kv_heads, size]`` into the step's slots."""
        keys, values = keys.contiguous(), values.contiguous()
        self._library.write(
            ctypes.byref(self.native[layer]), ctypes.byref(step.native), keys.data_ptr(), values.data_ptr()
        )

    def attend(  # noqa: PLR0913 (what attention depends on)
        self,
        layer: int,
        step: PackedStep,
        query: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attend causally: float32 ``[num_tokens, heads, key_size] -> [num_tokens, heads, value_size]``."""
        query = query.contiguous()
        tokens, heads, size = query.shape
        self.group = max(self.group, heads // self.shapes[layer].kv_heads)
        out = query.new_empty(tokens, heads, self.shapes[layer].value_size)
        call = native.Attention(
            query=query.data_ptr(),
            query_stride=heads * size,
            out=out.data_ptr(),
            out_stride=heads * out.shape[2],
            heads=heads,
            window=window or 0,
            scale=scale,
            softcap=softcap or 0.0,
        )
        self._library.attend(ctypes.byref(self.native[layer]), ctypes.byref(step.native), ctypes.byref(call))
        return out


def _zeros(*shape: int) -> torch.Tensor:
    return torch.from_numpy(huge(math.prod(shape) * 4)).view(torch.float32).view(shape)
