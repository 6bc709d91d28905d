"""Rows of a planned step that go on with each other's blocks, as the device alone knows: tables, slots and copies.

Two launches, neither of which waits for the host: one program for each group of rows rewrites what the plan says of
them, and then one for each row and layer copies a block where one is to be copied.
Import this module only where triton is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
import triton
import triton.language as tl

from folo_kernels.gpu.blocks import upload
from folo_kernels.gpu.plan import FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_kernels.gpu.blocks import DeviceBlocks
    from folo_kernels.gpu.plan import Int32s
    from folo_kernels.gpu.staging import StagedPlan

_ROW_FIELDS = tl.constexpr(FIELDS)
_COLUMNS = 64
"""Entries of a table that are moved at once."""
_CHUNK = 4096
"""Numbers of a block that are copied at once."""


@attrs.frozen(slots=True, kw_only=True)
class Moves:
    """Which rows of a step may go on with whose blocks."""

    parents: torch.Tensor
    """int64 ``[rows]`` on the device: the row that each one continues."""
    groups: Sequence[tuple[int, int]]
    """First row and number of rows of each group; a parent is of its row's group."""
    spares: Int32s
    """int32 ``[rows]``: the block that a row takes in place of its parent's last one, if that is full in part."""


def regroup(plan: StagedPlan, slots: torch.Tensor, blocks: DeviceBlocks, moves: Moves) -> None:
    """Give each row of some groups its parent's blocks; its last one becomes a copy, in a block of its own.

    Args:
        plan: where the tables lie on the device. Each row of the groups has one new token.
        slots: int64 ``[tokens]``: where new keys and values go; rewritten for rows that get a copy.
        blocks: the keys and values.
        moves: who takes whose blocks.
    """
    count, widest = len(moves.groups), max(number for _, number in moves.groups)
    groups = [number for group in moves.groups for number in group]
    groups += [0] * (-len(groups) % 4)  # spares begin at a multiple of 16 bytes: kernels are compiled for that once
    told = upload([*groups, *moves.spares.tolist()], blocks.device, torch.int32)
    lanes = max(2, int(triton.next_power_of_2(widest)))
    copies = torch.empty((count * lanes, 2), dtype=torch.int32, device=blocks.device)
    _regroup_kernel[(count,)](
        plan.part("tables"), plan.tables.shape[1], plan.part("rows"), slots, moves.parents,
        told, told[len(groups) :], copies,
        BLOCK_SIZE=blocks.block_size, LANES=lanes, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    for pool in blocks.pools():
        numbers = pool[0, 0].numel()
        _copy_kernel[(count * lanes, len(pool))](
            pool, pool.stride(0), pool.stride(1), copies, numbers, CHUNK=_CHUNK, num_warps=4
        )


@triton.jit(do_not_specialize=["width"])
def _regroup_kernel(
    tables, width, rows, slots, parents, groups, spares, copies,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Per group: its rows' tables and slots, and which block is copied where (0 and 0 for none)."""
    group, lane = tl.program_id(0), tl.arange(0, LANES)
    first, count = tl.load(groups + 2 * group), tl.load(groups + 2 * group + 1)
    row, there = first + lane, lane < count
    parent = tl.load(parents + row, mask=there, other=0).to(tl.int32)
    parent = tl.where(there, parent, row)
    position = tl.load(rows + row * _ROW_FIELDS + 1, mask=there, other=1) - 1
    token = tl.load(rows + row * _ROW_FIELDS, mask=there, other=0)
    last, offset = position // BLOCK_SIZE, position % BLOCK_SIZE
    moved = there & (parent != row)
    copied = moved & (offset > 0)
    source = tl.load(tables + parent * width + last, mask=copied, other=0)
    spare = tl.load(spares + row, mask=copied, other=0)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        before = moved[:, None] & (column[None, :] < last[:, None])
        taken = tl.load(tables + parent[:, None] * width + column[None, :], mask=before, other=0)
        tl.debug_barrier()  # all have read what is overwritten now
        tl.store(tables + row[:, None] * width + column[None, :], taken, mask=before)
        tl.debug_barrier()
    tl.store(tables + row * width + last, spare, mask=copied)
    tl.store(slots + token, spare.to(tl.int64) * BLOCK_SIZE + offset, mask=copied)
    place = copies + 2 * (group * LANES + lane)
    tl.store(place, source)
    tl.store(place + 1, spare)


@triton.jit
def _copy_kernel(pool, layer_stride, block_stride, copies, numbers, CHUNK: tl.constexpr):
    """Per row and layer: copy a block, if there is one to copy."""
    source, target = tl.load(copies + 2 * tl.program_id(0)), tl.load(copies + 2 * tl.program_id(0) + 1)
    if target > 0:
        layer = pool + tl.program_id(1).to(tl.int64) * layer_stride
        for start in range(0, numbers, CHUNK):
            place = start + tl.arange(0, CHUNK)
            taken = tl.load(layer + source.to(tl.int64) * block_stride + place, mask=place < numbers)
            tl.store(layer + target.to(tl.int64) * block_stride + place, taken, mask=place < numbers)
