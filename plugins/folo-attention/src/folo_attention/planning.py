"""Which of a step's rows are attended to in one call, and where their keys are.

Sequences with one new token (decode) are sorted by length and batched with neighbours of nearly the same length;
longer runs of new tokens (prefill) are cut into tiles of one sequence. Both differ between layers by the sliding window
alone, so tiles are made once a step for each window that a layer asks for, and shared by all its layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionMetadata

QUERY_TILE = 256
"""Longest run of one sequence's new tokens attended to at once; bounds the mask, and skips keys that lie ahead."""

MAX_BATCH = {"cpu": 8, "cuda": 256}
"""Most sequences in one decode call: on a CPU the gathered keys should stay in its cache."""

MAX_PADDING = 0.25
"""Largest share of padding in a decode call's keys."""


@attrs.define(slots=True, eq=False)
class Tile:
    """Rows attended to in one call, and the slots they may see."""

    rows: slice
    """Packed rows of a prefill tile; places among ``decode_rows`` of a decode tile."""
    slots: slice | torch.Tensor
    """A run of slots to view, or int64 slots to gather."""
    mask: torch.Tensor | None = None
    """Added to scores: 0 where a key is seen, else minus infinity. None if all are, or ``is_causal`` says which."""
    is_causal: bool = False
    """There are as many keys as queries, and each query sees those up to its own."""


class StepPlan:
    """One step's tiles, by sliding window."""

    def __init__(
        self, metadata: AttentionMetadata, *, zero_slot: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._metadata = metadata
        self._zero_slot = zero_slot
        self._device = device
        self._dtype = dtype
        counts = np.diff(metadata.query_start)
        self._prefills: list[int] = np.flatnonzero(counts > 1).tolist()
        decodes = np.flatnonzero(counts == 1)
        self._decodes = decodes[np.argsort(metadata.seq_lens[decodes], kind="stable")]
        self.decode_rows = self._to_device(metadata.query_start[self._decodes]) if len(decodes) else None
        """int64: packed rows of the sequences with one new token, shortest sequence first."""
        self._prefill_tiles: dict[int | None, list[Tile]] = {}
        self._decode_tiles: dict[int | None, list[Tile]] = {}

    def prefill_tiles(self, window: int | None) -> list[Tile]:
        """Tiles of the sequences with several new tokens."""
        if window not in self._prefill_tiles:
            self._prefill_tiles[window] = [tile for i in self._prefills for tile in self._cut(i, window)]
        return self._prefill_tiles[window]

    def decode_tiles(self, window: int | None) -> list[Tile]:
        """Tiles of the sequences with one new token; together they cover ``decode_rows`` in order."""
        if window not in self._decode_tiles:
            self._decode_tiles[window] = list(self._batch(window))
        return self._decode_tiles[window]

    def _to_device(self, array: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)

    def _cut(self, sequence: int, window: int | None) -> Iterator[Tile]:
        metadata = self._metadata
        start, end = (int(row) for row in metadata.query_start[sequence : sequence + 2])
        past = int(metadata.seq_lens[sequence]) - (end - start)
        for first in range(start, end, QUERY_TILE):
            rows = slice(first, min(first + QUERY_TILE, end))
            position = past + first - start
            begin = 0 if window is None else max(0, position - window + 1)
            slots = self._run(sequence, begin, position + rows.stop - first)
            if position == 0 and (window is None or window >= rows.stop - first):
                yield Tile(rows, slots, is_causal=rows.stop - first > 1)
            else:
                yield Tile(rows, slots, self._causal_mask(rows.stop - first, position - begin, window))

    def _batch(self, window: int | None) -> Iterator[Tile]:
        lengths = self._metadata.seq_lens[self._decodes].astype(np.int64)
        begins = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
        for first, last in batches(lengths - begins, MAX_BATCH.get(self._device.type, 1)):
            rows = slice(first, last)
            if last - first == 1:
                yield Tile(rows, self._run(int(self._decodes[first]), int(begins[first]), int(lengths[first])))
            else:
                yield self._gathered(rows, begins[rows], lengths[rows])

    def _run(self, sequence: int, begin: int, end: int) -> slice | torch.Tensor:
        """Slots of the positions ``begin:end``: a slice if the blocks are consecutive."""
        size = self._metadata.block_size
        blocks = self._metadata.block_tables[sequence, begin // size : -(-end // size)].astype(np.int64)
        if (np.diff(blocks) == 1).all():
            first = int(blocks[0]) * size + begin % size
            return slice(first, first + end - begin)
        positions = np.arange(begin % size, begin % size + end - begin)
        return self._to_device(blocks[positions // size] * size + positions % size)

    def _gathered(self, rows: slice, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tile:
        """A batch of sequences as one rectangle of slots, padded with the slot of zeros."""
        size = self._metadata.block_size
        positions = begins[:, None] + np.arange(int((lengths - begins).max()))
        seen = positions < lengths[:, None]
        positions = np.where(seen, positions, 0)
        blocks = self._metadata.block_tables[self._decodes[rows, None], positions // size].astype(np.int64)
        slots = np.where(seen, blocks * size + positions % size, self._zero_slot)
        mask = None
        if not seen.all():
            hidden = torch.from_numpy(~seen).to(self._device)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            mask = mask.masked_fill_(hidden, -math.inf)[:, None, None]
        return Tile(rows, self._to_device(slots.ravel()), mask)

    def _causal_mask(self, num_queries: int, past: int, window: int | None) -> torch.Tensor:
        """``[num_queries, past + num_queries]``: 0 where a query sees a key, else minus infinity."""
        query = torch.arange(past, past + num_queries, device=self._device)[:, None]
        key = torch.arange(past + num_queries, device=self._device)
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -math.inf)


def batches(lengths: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Cut ascending lengths into ``(first, last)`` runs of at most ``most``, with little padding in each."""
    first, total = 0, 0
    for last, length in enumerate(lengths.tolist()):
        padding = length * (last - first + 1) - (total + length)
        if last - first == most or padding > MAX_PADDING * length * (last - first + 1):
            yield first, last
            first, total = last, 0
        total += length
    if len(lengths):
        yield first, len(lengths)
