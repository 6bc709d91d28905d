"""Steps' plans on the device: one copy from pinned memory a step, which nobody waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_kernels.gpu.plan import FIELDS, cut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from folo_kernels.gpu.plan import StepWork, Tuning

    Int32s = NDArray[np.int32]

RING = 4
"""Pinned buffers: up to two steps are in flight while the next is written."""


@attrs.frozen(slots=True, kw_only=True)
class Layout:
    """Where the parts of a plan lie, in int32 numbers. All but the tiles lie where the number of rows says."""

    items: int
    rows: int
    tables: int
    tiles: int
    end: int

    @classmethod
    def of(cls, num_rows: int, width: int, num_tiles: int, tuning: Tuning) -> Layout:
        """Lay out a step of ``num_rows`` sequences with block tables of ``width`` blocks."""
        items = FIELDS
        rows = items + tuning.item_room(num_rows) * FIELDS
        tables = rows + num_rows * FIELDS
        # Rounded up, so that the tiles are aligned in every step and kernels are compiled for that once.
        tiles = tables + -(-num_rows * width // FIELDS) * FIELDS
        return cls(items=items, rows=rows, tables=tables, tiles=tiles, end=tiles + 2 * num_tiles)


@attrs.define(slots=True, eq=False)
class StagedPlan:
    """One step's plan, on the device once :meth:`Stager.put` has run."""

    query_start: Int32s
    seq_lens: Int32s
    tables: Int32s
    """int32 ``[n, width]``: no wider than the longest sequence needs."""
    exchanging: Sequence[tuple[int, int]]
    """Groups of rows whose tables may have been exchanged on the device since (see ``plan.cut``)."""
    is_captured: bool
    work: StepWork
    tuning: Tuning
    device: torch.Tensor | None = None
    layout: Layout | None = None

    @property
    def num_rows(self) -> int:
        """Sequences of the step, padding included."""
        return len(self.seq_lens)

    @property
    def item_programs(self) -> int:
        """Items to launch programs for: a captured step's number depends on its rows alone."""
        return self.tuning.item_room(self.num_rows) if self.is_captured else len(self.work.items)

    @property
    def has_shared(self) -> bool:
        """Launch what can attend for several rows at once."""
        return self.work.has_shared or (self.is_captured and self.tuning.rows_per_chunk > 1 and self.num_rows > 1)

    @property
    def num_slots(self) -> int:
        """Partial results to have room for."""
        return self.tuning.slot_room(self.num_rows) if self.is_captured else self.work.num_slots

    def part(self, name: str) -> torch.Tensor:
        """The plan's ``header``, ``items``, ``rows``, ``tables`` or ``tiles`` on the device."""
        assert self.device is not None  # noqa: S101 (put() comes first)
        assert self.layout is not None  # noqa: S101
        return self.device[0 if name == "header" else getattr(self.layout, name) :]


class Stager:
    """Makes plans and puts them on a device, always at the same place, for graphs that read them there."""

    def __init__(self, block_size: int, device: torch.device, *, max_rows: int, max_width: int, tuning: Tuning) -> None:
        """Allocate room for steps of ``max_rows`` sequences of ``max_width`` blocks each.

        A larger step is planned too, in memory of its own, unless it is captured.
        """
        self._block_size = block_size
        self._device = device
        self.tuning = tuning
        room = Layout.of(max_rows, max_width, max_rows, tuning).end
        self._memory = torch.zeros(room, dtype=torch.int32, device=device)
        self._pinned: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)] * RING
        self._events = [torch.cuda.Event() for _ in range(RING)] if device.type == "cuda" else []
        self._turn = 0
        self._held: StagedPlan | None = None

    def plan(
        self,
        query_start: Int32s,
        seq_lens: Int32s,
        tables: Int32s,
        *,
        is_captured: bool = False,
        exchanging: Sequence[tuple[int, int]] = (),
    ) -> StagedPlan:
        """Decide a step's work and put it on the device (arguments as for ``plan.cut``)."""
        width = max(1, -(-int(seq_lens.max(initial=0)) // self._block_size))
        tables = tables[:, :width]
        work = cut(query_start, seq_lens, tables, self._block_size, self.tuning, exchanging)
        plan = StagedPlan(query_start, seq_lens, tables, exchanging, is_captured, work, self.tuning)
        self.put(plan)
        return plan

    def regroup(self, plan: StagedPlan, group: int) -> None:
        """Plan a step again, for more query heads per KV head than it was planned for, as will be all steps to come."""
        self.tuning = plan.tuning = attrs.evolve(self.tuning, group=max(group, self.tuning.group))
        plan.work = cut(plan.query_start, plan.seq_lens, plan.tables, self._block_size, plan.tuning, plan.exchanging)
        self._held = plan.device = None
        self.put(plan)

    def put(self, plan: StagedPlan) -> None:
        """Copy a plan to the device, unless it is what lies there, or lies in memory of its own."""
        if self._held is plan or (plan.device is not None and plan.device is not self._memory):
            return
        rows, width = plan.tables.shape
        layout = plan.layout = Layout.of(rows, width, len(plan.work.tiles), plan.tuning)
        host = self._next_buffer(layout.end)
        _write(host.numpy(), layout, plan)
        plan.device = self._room(plan, layout.end)
        plan.device[: layout.end].copy_(host[: layout.end], non_blocking=True)
        if self._events:
            self._events[self._turn].record()
        if plan.device is self._memory:
            self._held = plan

    def _room(self, plan: StagedPlan, size: int) -> torch.Tensor:
        if size <= self._memory.numel():
            return self._memory
        if plan.is_captured:
            message = (
                f"plan: a captured step of {plan.num_rows} rows and {plan.tables.shape[1]} blocks each needs {size} "
                f"numbers, room is for {self._memory.numel()}: give max_rows and max_width that cover it"
            )
            raise ValueError(message)
        return torch.empty(size, dtype=torch.int32, device=self._device)

    def _next_buffer(self, size: int) -> torch.Tensor:
        """Return a pinned buffer that no copy reads any more."""
        self._turn = (self._turn + 1) % RING
        if self._events:
            self._events[self._turn].synchronize()
        if self._pinned[self._turn].numel() < size:
            pinned = self._device.type == "cuda"
            self._pinned[self._turn] = torch.empty(max(2 * size, 4096), dtype=torch.int32, pin_memory=pinned)
        return self._pinned[self._turn]


def _write(host: Int32s, layout: Layout, plan: StagedPlan) -> None:
    """Lay a plan out in host memory."""
    work, (rows, width) = plan.work, plan.tables.shape
    host[:FIELDS] = 0
    host[0], host[1] = len(work.items), width
    host[layout.items : layout.items + work.items.size] = work.items.ravel()
    host[layout.rows : layout.tables] = work.rows.ravel()
    np.copyto(host[layout.tables : layout.tables + rows * width].reshape(rows, width), plan.tables)
    host[layout.tiles : layout.end] = work.tiles.ravel()
