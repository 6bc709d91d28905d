"""Paged attention whose every row is computed in one fixed order, whatever else is in the step.

A row's bits depend on its query and on the keys and values of its own sequence up to itself, never on how many rows a
call has, which sequences they belong to, how a prompt was cut, where blocks lie or how many threads compute. For that

- keys are cut into tiles of ``KEY_TILE`` positions, counted from position 0 of the sequence;
- scores are products over the head size alone, for a number of rows padded to a multiple that is found by trying
  (``stable_rows``);
- the largest score is exact in any order, and ``exp`` of a hidden key is an exact zero;
- sums of weights and of weighted values run over one whole tile, and then tile after tile, so that a tile in which a
  row sees nothing adds an exact zero.

Measured with torch 2.13 (MKL, AVX2), in float32 on one to four threads: rows of ``torch.bmm`` are the same bits for any
number of rows that is a multiple of four, any number of columns and any batch, and below twelve for no other number;
``exp``, ``tanh``, ``amax`` and ``sum`` over the last dimension do not depend on the number of rows at all. With fewer
than twelve columns that are no multiple of four, a row's bits depend on its place among the others, and with 17 on the
number of threads from three on: values of such sizes are padded with columns of zeros. In float64 scores depend on the
number of columns even on one thread, so it is left out.
"""

from __future__ import annotations

from itertools import groupby, product
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch.nn import functional

from folo_attention.storage import PagedStorage
from folo_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionMetadata, KVCacheSpec

KEY_TILE = 128
"""Positions whose weighted values are summed by one product."""

MULTIPLES = (4, 8, 16, 32)
"""Multiples that the number of a product's rows is padded to: the first is taken with which rows keep their bits."""

COLUMNS = 16
"""The size of a value's head is padded to a multiple of this."""

TRIED_ROWS = 192
"""Rows of the product that others are compared with."""

QUERY_TILE = 128
"""Longest run of one sequence's new tokens attended to at once; bounds the scores, and skips keys that lie ahead."""

MAX_BATCH = 8
"""Most sequences in one decode call: their keys and scores should stay in the processor's cache."""


@attrs.frozen(slots=True, eq=False, kw_only=True)
class Call:
    """Rows attended to together: equally many of each of some sequences, over equally many key tiles."""

    rows: torch.Tensor
    """int64 ``[sequences * rows of each]``: packed rows."""
    slots: torch.Tensor
    """int64 ``[sequences, keys]``: where the keys are, whole tiles of them; the slot of zeros where no row sees one."""
    hidden: torch.Tensor
    """bool ``[sequences, 1, rows of each, 1, masked keys]``: what a row does not see."""
    masked: slice
    """Keys that some row does not see, and those between them."""
    num_sequences: int
    num_rows: int
    """Rows of each sequence."""


class FixedPlan:
    """One step's calls, by sliding window."""

    def __init__(self, metadata: AttentionMetadata, *, zero_slot: int, device: torch.device) -> None:
        self._metadata = metadata
        self._zero_slot = zero_slot
        self._device = device
        self._counts = np.diff(metadata.query_start).astype(np.int64)
        self._calls: dict[int | None, list[Call]] = {}
        self._places: dict[tuple[int | None, int], list[torch.Tensor]] = {}

    def calls(self, window: int | None) -> list[Call]:
        """Calls that together cover every row once."""
        if window not in self._calls:
            self._calls[window] = [*self._decodes(window), *self._prefills(window)]
        return self._calls[window]

    def places(self, window: int | None, num_heads: int) -> list[torch.Tensor]:
        """For each call, int64 ``[sequences * heads * keys]``: its places among ``slots * heads``, head by head."""
        key = (window, num_heads)
        if key not in self._places:
            heads = torch.arange(num_heads, device=self._device)[:, None]
            self._places[key] = [(call.slots[:, None] * num_heads + heads).flatten() for call in self.calls(window)]
        return self._places[key]

    def _decodes(self, window: int | None) -> Iterator[Call]:
        """Sequences with one new token, those of equally many key tiles together."""
        sequences = np.flatnonzero(self._counts == 1)
        ends = self._metadata.seq_lens[sequences].astype(np.int64)
        first, last = _tiles(ends - 1, ends, window)
        order = np.argsort(last - first, kind="stable")
        for _, like in groupby(order.tolist(), key=lambda i: int(last[i] - first[i])):
            alike = list(like)
            for start in range(0, len(alike), MAX_BATCH):
                chosen = np.array(alike[start : start + MAX_BATCH])
                yield self._call(sequences[chosen], ends[chosen] - 1, 1, window)

    def _prefills(self, window: int | None) -> Iterator[Call]:
        """Longer runs of one sequence's new tokens."""
        for sequence in np.flatnonzero(self._counts > 1):
            end = int(self._metadata.seq_lens[sequence])
            for begin in range(end - int(self._counts[sequence]), end, QUERY_TILE):
                count = min(QUERY_TILE, end - begin)
                yield self._call(np.array([sequence]), np.array([begin]), count, window)

    def _call(self, sequences: NDArray[np.int64], begins: NDArray[np.int64], count: int, window: int | None) -> Call:
        """``count`` rows of each sequence, from position ``begins`` of it on."""
        metadata = self._metadata
        ends = begins + count
        first, last = _tiles(begins, ends, window)
        keys = first[:, None] * KEY_TILE + np.arange(int(last[0] - first[0]) * KEY_TILE)
        queries = begins[:, None] + np.arange(count)
        hidden = keys[:, None] > queries[:, :, None]
        if window is not None:
            hidden |= keys[:, None] <= queries[:, :, None] - window
        starts = metadata.query_start[sequences + 1] - metadata.seq_lens[sequences] + begins
        places = np.flatnonzero(hidden.any((0, 1)))
        masked = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
        return Call(
            rows=self._to_device((starts[:, None] + np.arange(count)).ravel()),
            slots=self._to_device(self._slots(sequences, keys, np.all(hidden, axis=1))),
            hidden=self._to_device(hidden[:, None, :, None, masked]),
            masked=masked,
            num_sequences=len(sequences),
            num_rows=count,
        )

    def _slots(
        self, sequences: NDArray[np.int64], positions: NDArray[np.int64], unread: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Slots of each sequence's positions, ``[sequences, keys]``; that of zeros for those no row reads."""
        size = self._metadata.block_size
        held = np.where(unread, 0, positions)  # the others may lie outside the table
        blocks = self._metadata.block_tables[sequences[:, None], held // size].astype(np.int64)
        return np.where(unread, self._zero_slot, blocks * size + held % size)

    def _to_device(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _tiles(
    begins: NDArray[np.int64], ends: NDArray[np.int64], window: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First key tile that rows ``begins:ends`` of a sequence see, and the one after the last."""
    seen = np.zeros_like(begins) if window is None else np.maximum(begins - window + 1, 0)
    return seen // KEY_TILE, -(-ends // KEY_TILE)


def _padded(size: int) -> int:
    return -(-size // COLUMNS) * COLUMNS


def _widened(value: torch.Tensor) -> torch.Tensor:
    """``value [..., size]`` with columns of zeros up to a padded size; itself where it has that size."""
    size = value.shape[-1]
    return value if size % COLUMNS == 0 else functional.pad(value, (0, _padded(size) - size))


class FixedOrderBackend(PagedStorage):
    """``AttentionBackend`` whose rows are the same bits in any batch and any chunk, on a CPU."""

    wants_device_metadata = False

    def __init__(self) -> None:
        super().__init__()
        self._rows = MULTIPLES[-1]

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate as ``PagedStorage`` does, and find how many rows products need on this processor.

        Raises:
            ConfigError: rows of products keep their bits with none of ``MULTIPLES``.
        """
        super().allocate(specs, num_blocks, block_size, device)
        sizes = {(spec.head_size, spec.v_head_size or spec.head_size, spec.dtype) for spec in specs}
        shapes = {(size, _padded(value_size), dtype) for size, value_size, dtype in sizes}
        self._rows = max((stable_rows(*shape) for shape in shapes), default=MULTIPLES[0])

    def plan(self, metadata: AttentionMetadata) -> FixedPlan:
        """Decide which rows are attended to together; index tensors are made when a layer first needs them."""
        return FixedPlan(metadata, zero_slot=self._num_slots, device=self._device)

    def forward(  # noqa: PLR0913 (the protocol's signature)
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
        keys, values = self._write(layer, metadata.slot_mapping, key, value)
        plan = metadata.plan
        if not isinstance(plan, FixedPlan):
            raise TypeError(f"metadata.plan: {type(plan).__name__}: give what plan() returned for this step")
        calls, places = plan.calls(sliding_window), plan.places(sliding_window, key.shape[1])
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for call, place in zip(calls, places, strict=True):
            k, v = self._gather_heads("keys", keys, place, call), self._gather_heads("values", values, place, call)
            rows = query.index_select(0, call.rows)
            output.index_copy_(0, call.rows, self._attend(rows, k, v, call, scale=scale, softcap=softcap))
        return output

    def _gather_heads(self, name: str, cache: torch.Tensor, places: torch.Tensor, call: Call) -> torch.Tensor:
        """``[sequences * kv_heads, keys, size]`` from ``[slots, kv_heads, size]``."""
        gathered = self._gather(name, cache.flatten(0, 1), places)
        return gathered.view(-1, call.slots.shape[1], cache.shape[2])

    def _attend(  # noqa: PLR0913 (what attention depends on)
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        *,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """``query [rows, heads, size]`` over ``key, value [sequences * kv_heads, keys, size]``."""
        batch, count, size = call.num_sequences, call.num_rows, value.shape[2]
        kv_heads = key.shape[0] // batch
        groups = query.shape[1] // kv_heads
        # The heads that share keys are rows of one product, beside the rows of other positions.
        used = count * groups
        q = query.new_zeros(batch, kv_heads, -(-used // self._rows) * self._rows, query.shape[2])
        folded = query.view(batch, count, kv_heads, groups, -1).transpose(1, 2)
        torch.mul(folded, scale, out=q[:, :, :used].unflatten(2, (count, groups)))
        scores = self._scratch_of("scores", (key.shape[0], q.shape[2], key.shape[1]), query.dtype)
        torch.bmm(q.flatten(0, 1), key.transpose(1, 2), out=scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        seen = scores.unflatten(0, (batch, kv_heads))[:, :, :used, call.masked].unflatten(2, (count, groups))
        seen.masked_fill_(call.hidden, -torch.inf)
        out = _weigh(scores, _widened(value))[..., :size]
        out = out.unflatten(0, (batch, kv_heads))[:, :, :used].unflatten(2, (count, groups))
        by_row: torch.Tensor = out.transpose(1, 2).reshape(batch * count, kv_heads * groups, -1)
        return by_row


def _weigh(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax of ``scores [b, rows, keys]``, which it overwrites, times ``value [b, keys, size]``, tile after tile."""
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    sums = weights.unflatten(-1, (-1, KEY_TILE)).sum(-1)
    out, total = torch.bmm(weights[..., :KEY_TILE], value[:, :KEY_TILE]), sums[..., 0].clone()
    for tile in range(1, sums.shape[-1]):
        keys = slice(tile * KEY_TILE, (tile + 1) * KEY_TILE)
        out += torch.bmm(weights[..., keys], value[:, keys])
        total += sums[..., tile]
    return out.div_(total[..., None])


def stable_rows(key_size: int, value_size: int, dtype: torch.dtype) -> int:
    """The first of ``MULTIPLES`` with which both of attention's products give each row the same bits.

    Tried with several numbers of rows, columns and matrices, on one thread and on as many as there are.

    Raises:
        ConfigError: there is none.
    """
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    shapes = ((TRIED_ROWS, key_size), (2 * KEY_TILE, key_size), (2 * KEY_TILE, value_size))
    operands = [torch.randn(3, *shape, generator=generator).to(dtype) for shape in shapes]
    try:
        torch.set_num_threads(1)
        wanted = _products(*operands)
        for multiple in MULTIPLES:
            if all(_keeps_bits(operands, wanted, multiple, number) for number in {1, threads}):
                return multiple
    finally:
        torch.set_num_threads(threads)
    raise ConfigError(
        f"deterministic: True: rows of products ({dtype}, heads of {key_size} and {value_size}) depend on their number "
        f"with {threads} threads of this processor: set OMP_NUM_THREADS=1, or leave deterministic off"
    )


def _keeps_bits(operands: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], multiple: int, threads: int) -> bool:
    torch.set_num_threads(threads)
    query, key, value = operands
    counts = (multiple, 3 * multiple, TRIED_ROWS // 2)
    for count, batch, keys in product(counts, (1, 2, 3), (KEY_TILE, 2 * KEY_TILE)):
        # A row must not depend on its place among the others either: places of every remainder by four.
        for rows in (slice(first, first + count) for first in (0, 1, 7, TRIED_ROWS - count - 2)):
            got = _products(query[:batch, rows].contiguous(), key[:batch, :keys], value[:batch, :keys])
            if not all(torch.equal(one, all_rows[:batch, rows]) for one, all_rows in zip(got, wanted, strict=True)):
                return False
    return True


def _products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the first key tile, and its values weighed with them."""
    scores = torch.bmm(query, key.transpose(1, 2))[..., :KEY_TILE]
    return scores, torch.bmm(scores, value[:, :KEY_TILE])
