"""The work of one step of attention, decided on the host with numpy.

A sequence with one new token is a *decode row*. Its keys are cut into *items* of about equal length, which programs on
the device take one at a time; where a row has several items, the last one to end merges all partial results. Adjacent
decode rows whose block tables begin alike (forks of one prompt, hits of one cached prefix) form a group, whose common
blocks are read once for a *chunk* of its rows. A sequence with several new tokens is cut into *tiles* of query tokens.

All of it is int32, in arrays whose places on the device depend on the number of sequences alone: a graph that was
captured for that number reads the plan of the step it is replayed for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Int32s = NDArray[np.int32]

FIELDS = 8
"""int32 numbers in the header, in an item and in a row."""

ALIGN = 32
"""Items are multiples of so many tokens, so that few of a program's loads are cut short."""

MANY_ROWS = 8
"""A chunk of at least so many rows is cut into few items: each leaves a partial result per row."""


@attrs.frozen(slots=True, kw_only=True)
class Tuning:
    """What the cutting of a step depends on besides the step."""

    kv_heads: int
    """Each item is one program per KV head."""
    group: int
    """Most query heads that share a KV head."""
    processors: int = 132
    """Streaming multiprocessors of the device."""
    programs_per_processor: int = 4
    """Programs that run on one at a time."""
    waves: int = 4
    """Times that the device is filled with programs, at most, so that the last, unfilled time costs little."""
    few_programs: int = 2
    """Programs per processor that a single row is cut into, at most: each leaves a partial result to merge."""
    min_split: int = 256
    """Fewest tokens of an item that a row was cut into."""
    few_split: int = 128
    """The same where rows are too few for a program on each processor."""
    min_shared: int = 128
    """Fewest tokens that rows must share to be grouped."""
    shared_rows: int = 64
    """Query rows (rows times query heads per KV head) of one chunk, at most."""
    shared_splits: int = 8
    """Items that a chunk of many rows is cut into, at most."""
    query_rows: int = 128
    """Query rows (tokens times query heads per KV head) of one tile, at most."""

    @property
    def rows_per_chunk(self) -> int:
        """Decode rows of one chunk, at most."""
        return self.shared_rows // self.group

    @property
    def tokens_per_tile(self) -> int:
        """New tokens of one prefill tile, at most."""
        return max(1, self.query_rows // self.group)

    def extra_items(self, num_rows: int) -> int:
        """Items beyond one for each row and chunk, at most: from less than a wave for few rows to ``waves``."""
        wave = -(-self.processors * self.programs_per_processor // self.kv_heads)
        few = max(16 * num_rows, -(-self.processors * self.few_programs // self.kv_heads))
        return min(max(4 * num_rows, min(few, wave)), self.waves * wave)

    def least(self, num_rows: int) -> int:
        """Fewest tokens of an item in a step of so many decode rows."""
        return self.few_split if num_rows * self.kv_heads < self.processors else self.min_split

    def item_room(self, num_rows: int) -> int:
        """Items that a step of so many sequences has at most, over its rows and chunks."""
        return 2 * num_rows + self.extra_items(num_rows)

    def slot_room(self, num_rows: int) -> int:
        """Partial results (one per item and row of it) of a step of so many sequences, at most."""
        return (2 + self.shared_splits) * num_rows + MANY_ROWS * self.extra_items(num_rows)


@attrs.frozen(slots=True, kw_only=True)
class StepWork:
    """The work of one step. ``items``, ``rows`` and ``tiles`` are what the kernels read."""

    items: Int32s
    """``[num_items, 8]``: first row, rows, first token, end token, first partial slot or -1 to write the output."""
    rows: Int32s
    """``[num_seqs, 8]``: first packed token, sequence length, first slot and number of its own partial results, first
    slot, stride and number of its chunk's, and new tokens. The number of its own is -1 if nothing is to be merged."""
    tiles: Int32s
    """``[num_tiles, 2]``: row, and first of its new tokens. Tiles that see most keys come first."""
    num_slots: int
    """Partial results of the step."""
    has_shared: bool
    """Some items have several rows."""


def cut(  # noqa: PLR0913, PLR0917 (a whole step)
    query_start: Int32s,
    seq_lens: Int32s,
    tables: Int32s,
    block_size: int,
    tuning: Tuning,
    exchanging: Sequence[tuple[int, int]] = (),
) -> StepWork:
    """Cut a step into items and tiles.

    Args:
        query_start: int32 ``[n + 1]``: a sequence's new tokens are ``query_start[i]:query_start[i + 1]``.
        seq_lens: int32 ``[n]``: tokens to attend over, the new ones included; 0 in a padding row.
        tables: int32 ``[n, width]``: each sequence's blocks.
        block_size: tokens of a block.
        tuning: what decides sizes.
        exchanging: first row and number of the rows of groups whose tables may yet be exchanged on the device: of each,
            only what all its rows have in common counts as shared.
    """
    counts = np.diff(query_start)
    rows = np.zeros((len(seq_lens), FIELDS), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 7] = query_start[:-1], seq_lens, counts
    single = counts == 1
    decodes = np.flatnonzero(single & (seq_lens > 0))
    chunks = _chunks(decodes, seq_lens, tables, block_size, tuning, exchanging)
    items, num_slots, has_shared = _decode_items(rows, decodes, chunks, tuning)
    items = np.concatenate([items, _padding(np.flatnonzero(single & (seq_lens <= 0)))])
    tiles = _tiles(counts, seq_lens, tuning.tokens_per_tile)
    return StepWork(
        items=items,
        rows=rows,
        tiles=tiles,
        num_slots=num_slots,
        has_shared=has_shared,
    )


def _decode_items(rows: Int32s, decodes: Ints, chunks: Ints, tuning: Tuning) -> tuple[Int32s, int, bool]:
    """Cut the decode rows into items, and say in ``rows`` where each one's partial results will be."""
    segments = np.zeros((len(decodes) + len(chunks), 4), np.int64)
    own, shared = segments[: len(decodes)], segments[len(decodes) :]
    own[:, 0], own[:, 1], own[:, 3] = decodes, 1, rows[decodes, 1]
    shared[:, 0], shared[:, 1], shared[:, 3] = chunks.T
    sharing = _members(chunks)
    if len(chunks):
        begins = np.zeros(len(rows), np.int64)
        begins[sharing] = np.repeat(chunks[:, 2], chunks[:, 1])
        own[:, 2] = begins[decodes]
    extra, least = tuning.extra_items(len(rows)), tuning.least(len(decodes))
    items, splits, slots = _split(segments, extra, least, tuning.shared_splits)
    rows[:, 3] = -1
    rows[decodes, 2], rows[decodes, 3] = slots[: len(decodes)], splits[: len(decodes)]
    if len(chunks):
        parts = np.stack([slots[len(decodes) :] - chunks[:, 0], chunks[:, 1], splits[len(decodes) :]], axis=1)
        rows[sharing, 4:7] = np.repeat(parts, chunks[:, 1], axis=0)
        rows[sharing, 4] += sharing
    direct = (rows[:, 3] == 1) & (rows[:, 6] == 0)
    rows[direct, 3] = -1
    items[direct[items[:, 0]] & (items[:, 1] == 1), 4] = -1
    order = np.argsort(items[:, 2] - items[:, 3], kind="stable")
    return items[order], int(splits @ segments[:, 1]), len(chunks) > 0


def _padding(rows: Ints) -> Int32s:
    """Items of rows that see no token: each writes zeros."""
    items = np.zeros((len(rows), FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 4] = rows, 1, -1
    return items


def _members(chunks: Ints) -> Ints:
    """Rows of all chunks, chunk after chunk."""
    ends = np.cumsum(chunks[:, 1])
    return np.repeat(chunks[:, 0] + chunks[:, 1] - ends, chunks[:, 1]) + np.arange(ends[-1] if len(ends) else 0)


def _split(segments: Ints, extra: int, least: int, most: int) -> tuple[Int32s, Ints, Ints]:
    """Cut segments into items of about the same length.

    Args:
        segments: int64 ``[n, 4]``: first row, rows, first token, end token.
        extra: items beyond one for each segment, at most.
        least: fewest tokens of an item, unless its segment has fewer.
        most: most items of a segment of MANY_ROWS rows or more.

    Returns:
        The items, and for each segment its number of items and its first partial slot.
    """
    _, members, begins, ends = segments.T
    lengths = ends - begins
    target = max(least, -(-int(lengths.sum()) // extra))
    splits = -(-lengths // target)
    splits = np.where(members >= MANY_ROWS, np.minimum(splits, most), splits)
    pieces = np.maximum(-(-lengths // (np.maximum(splits, 1) * ALIGN)) * ALIGN, 1)
    splits = -(-lengths // pieces)
    results = splits * members
    slots = np.cumsum(results) - results
    parent = np.repeat(np.arange(len(segments)), splits)
    place = np.arange(len(parent)) - (np.cumsum(splits) - splits)[parent]
    items = np.zeros((len(parent), FIELDS), np.int32)
    items[:, :4] = segments[parent]
    items[:, 2] += place * pieces[parent]
    items[:, 3] = np.minimum(items[:, 2] + pieces[parent], items[:, 3])
    items[:, 4] = slots[parent] + place * members[parent]
    return items, splits, slots


def _chunks(  # noqa: PLR0913, PLR0917 (as ``cut``)
    decodes: Ints,
    lengths: Int32s,
    tables: Int32s,
    block_size: int,
    tuning: Tuning,
    exchanging: Sequence[tuple[int, int]],
) -> Ints:
    """Chunks of rows that share a prefix: int64 ``[chunks, 3]``: first row, rows, tokens they share."""
    most = tuning.rows_per_chunk
    if most < 2 or len(decodes) < 2:  # noqa: PLR2004 (fewer share nothing)
        return np.zeros((0, 3), np.int64)
    common = common_blocks(decodes, lengths // block_size, tables, max(1, -(-tuning.min_shared // block_size)))
    level(common, exchanging)
    found = [
        (first + rows * i // parts, rows * (i + 1) // parts - rows * i // parts, shared * block_size)
        for first, rows, shared in groups(common)
        for parts in [-(-rows // most)]
        for i in range(parts)
    ]
    return np.array(found, np.int64).reshape(-1, 3)


def level(common: Ints, exchanging: Sequence[tuple[int, int]]) -> None:
    """Cut what rows share with the next, ``common``, down to what holds however rows of a group exchange tables."""
    for first, rows in exchanging:
        inside = common[first : first + rows - 1]
        around = slice(max(0, first - 1), first + rows)
        if len(inside):
            np.minimum(common[around], inside.min(), out=common[around])


def common_blocks(decodes: Ints, full: NDArray[np.integer], tables: Int32s, least: int) -> Ints:
    """Count the leading blocks that each row shares with the next: int64 ``[n - 1]``, 0 where fewer than ``least``.

    Args:
        decodes: the decode rows, ascending.
        full: int64 ``[n]``: full blocks of each row; later ones are never shared.
        tables: int32 ``[n, width]``.
        least: fewest blocks worth sharing, 1 at least.
    """
    common = np.zeros(max(0, len(full) - 1), np.int64)
    limits = np.minimum(full[1:], full[:-1])
    # The last block that a prefix must have tells most rows apart at once.
    alike = tables[1:, least - 1] == tables[:-1, least - 1] if least <= tables.shape[1] else limits < 0
    alike = alike & (limits >= least)
    pairs = np.flatnonzero(alike)
    if not len(pairs):
        return common
    decoding = np.zeros(len(full), np.bool_)
    decoding[decodes] = True
    pairs = pairs[decoding[pairs] & decoding[pairs + 1]]
    if not len(pairs):
        return common
    width = int(limits[pairs].max())
    first, last = int(pairs[0]), int(pairs[-1]) + 1
    if last - first < 2 * len(pairs):
        # Most rows between are concerned: comparing slices spares copies of their tables.
        lead = _leading(tables[first : last + 1, :width])[pairs - first]
    else:
        lead = _leading(tables[np.stack([pairs, pairs + 1], axis=1).ravel(), :width])[::2]
    lead = np.minimum(lead, limits[pairs])
    common[pairs] = np.where(lead >= least, lead, 0)
    return common


def _leading(tables: Int32s) -> Ints:
    """Count the leading entries that each row has in common with the next: int64 ``[n - 1]``."""
    unlike = tables[1:] != tables[:-1]
    lead: Ints = unlike.argmax(axis=1)
    lead[~unlike[np.arange(len(lead)), lead]] = tables.shape[1]
    return lead


def groups(common: Ints) -> list[tuple[int, int, int]]:
    """Cut adjacent rows into groups so that most tokens need not be read twice.

    Args:
        common: int64 ``[n - 1]``: leading blocks that row ``i`` shares with row ``i + 1``.

    Returns:
        For each group its first row, its number of rows and the blocks they share.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], common > 0, [False]])))
    found: list[tuple[int, int, int]] = []
    for first, last in edges.reshape(-1, 2).tolist():
        found += _best(common[first:last].tolist(), first)[1]
    return found


def _best(common: list[int], first: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Saved blocks and groups of a run of rows: one group, or those that fall apart where they share least."""
    least = min(common)
    whole = (len(common) * least, [(first, len(common) + 1, least)])
    if least == max(common):
        return whole
    saved, start = 0, 0
    parts: list[tuple[int, int, int]] = []
    for end in [i for i, shared in enumerate(common) if shared == least] + [len(common)]:
        if end > start:
            value, inner = _best(common[start:end], first + start)
            saved, parts = saved + value, parts + inner
        start = end + 1
    return (saved, parts) if saved > whole[0] else whole


def _tiles(counts: Ints, seq_lens: Int32s, size: int) -> Int32s:
    """Tiles of the sequences with several new tokens; those that see most keys come first."""
    several = np.flatnonzero((counts > 1) & (seq_lens > 0))
    if not len(several):
        return np.zeros((0, 2), np.int32)
    numbers = -(-counts[several] // size)
    row = np.repeat(several, numbers)
    first = (np.arange(len(row)) - np.repeat(np.cumsum(numbers) - numbers, numbers)) * size
    seen = seq_lens[row] - counts[row] + first
    return np.stack([row, first], axis=1).astype(np.int32)[np.argsort(-seen, kind="stable")]
