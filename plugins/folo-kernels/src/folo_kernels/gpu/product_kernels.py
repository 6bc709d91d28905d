"""Triton kernels of products of some rows with what surrounds them. ``products`` calls them.

A program makes a tile of outputs of some rows: ``W x^T``, outputs first, because tensor cores take 64 of a tile's first
dimension at once and any eight of its second, and rows are few. Both factors arrive by tensor descriptors, which give
zeros beyond their ends. Sizes in capitals are known when a kernel is compiled.

With SPLITS, several programs share a tile's inputs. Each leaves its sums where the others find them and counts itself;
the last one adds them in the order of the inputs, so that the result does not depend on who was last.

A norm is taken in two steps. Who makes the rows also leaves them times the norm's factor, and the sums of their squares
over each of its tiles; who multiplies them divides the product by the root of their mean. So no product has to look at
the whole of its rows first.

With PDL, a kernel is launched while its predecessor still runs, and has its weights brought near before it waits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from folo_kernels.gpu.layers import activated

LINE = tl.constexpr(64)
"""Numbers of 16 bits in one of the cache's lines."""


@triton.jit
def _await(
    weights, first_row, first, begin, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    SHARE: tl.constexpr, SECOND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Let the next kernel be launched, have a tile's weights brought near, and wait for the kernel before.

    A pair of tiles lies SECOND outputs apart.
    """
    if PDL:
        gdc_launch_dependents()
        if first_row == 0:
            pointers = weights + tl.minimum(first + tl.arange(0, BLOCK_OUT), OUTPUTS - 1) * INPUTS
            for start in range(begin, tl.minimum(begin + SHARE, INPUTS), LINE):
                _prefetch(pointers + start)
                if SECOND:
                    _prefetch(pointers + SECOND * INPUTS + start)
        gdc_wait()


@triton.jit
def _prefetch(pointers):
    """Have the device's cache fetch some lines; nobody waits."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _place(rows, OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """A program's tile, its first row and output, and its share of the inputs; neighbours share their weights."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_tiles * ((OUTPUTS + BLOCK_OUT - 1) // BLOCK_OUT)
    tile = tl.program_id(0) % tiles
    return tile, tile % row_tiles * BLOCK_ROWS, tile // row_tiles * BLOCK_OUT, tl.program_id(0) // tiles


@triton.jit
def _count(counters, tile, SPLITS: tl.constexpr):
    """Whether this program is the last of a tile's to count itself; it leaves the counter at zero."""
    # All warps must have stored their share before one of them counts it.
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(counters + tile, 0)
    return is_last


@triton.jit
def _cells(partials, tile, SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Places of a tile's partial sums ``[BLOCK_OUT, BLOCK_ROWS]``, of its first share."""
    cell = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    return partials + tile.to(tl.int64) * (SPLITS * BLOCK_OUT * BLOCK_ROWS) + cell


@triton.jit
def _sum(cells, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """Partial sums of all shares, added in their order."""
    # Other processors wrote them: what this one may have cached is passed over.
    total = tl.load(cells, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(cells + split * STEP, cache_modifier=".cg")
    return total


@triton.jit
def _squares(squares, row, rows, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr):
    """Sums of squares of rows ``[BLOCK_ROWS, PARTS_TILE]``, one for each tile of who made them."""
    part = tl.arange(0, PARTS_TILE)
    mask = (row < rows)[:, None] & (part < PARTS)[None, :]
    return tl.load(squares + row[:, None] * PARTS + part[None, :], mask=mask, other=0.0)


@triton.jit
def _multiply_pair(
    x, weight, first_row, first, second, begin, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Sums of two tiles of outputs of the same rows, ``[BLOCK_OUT, BLOCK_ROWS]`` each."""
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    other = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, SHARE, BLOCK_IN):
        a = x.load([first_row, begin + start])
        w = weight.load([first, begin + start])
        total = tl.dot(w, a.T, total, input_precision="ieee")
        v = weight.load([second, begin + start])
        other = tl.dot(v, a.T, other, input_precision="ieee")
    return total, other


@triton.jit
def product_kernel(
    x, weight, weights, out, scaled, factor, squares, new_squares, partials, counters, rows, epsilon,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A product, of rows yet to be divided (PARTS), added to what is there (ADD) and made ready for a norm (SCALE)."""
    tile, first_row, first, split = _place(rows, OUTPUTS, BLOCK_ROWS, BLOCK_OUT)
    share: tl.constexpr = (INPUTS + BLOCK_IN * SPLITS - 1) // (BLOCK_IN * SPLITS) * BLOCK_IN
    begin = split * share
    _await(weights, first_row, first, begin, INPUTS, OUTPUTS, BLOCK_OUT, share, 0, PDL)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    output = first + tl.arange(0, BLOCK_OUT)
    found = _squares(squares, row, rows, PARTS, PARTS_TILE)
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, share, BLOCK_IN):
        a = x.load([first_row, begin + start])
        w = weight.load([first, begin + start])
        total = tl.dot(w, a.T, total, input_precision="ieee")
    if SPLITS > 1:
        step: tl.constexpr = BLOCK_OUT * BLOCK_ROWS
        cells = _cells(partials, tile, SPLITS, BLOCK_ROWS, BLOCK_OUT)
        tl.store(cells + split * step, total)
        if not _count(counters, tile, SPLITS):
            return
        total = _sum(cells, SPLITS, step)
    y = tl.trans(total)
    if PARTS:
        y *= tl.rsqrt(tl.sum(found, axis=1) / INPUTS + epsilon)[:, None]
    cell = row[:, None] * OUTPUTS + output[None, :]
    mask = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    if ADD:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(out + cell, mask=mask, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + cell, y, mask=mask)
    if SCALE:
        # What is normalised is the sum as it is kept.
        y = y.to(tl.float32)
        scale = tl.load(factor + output, mask=output < OUTPUTS, other=0.0)[None, :]
        tl.store(scaled + cell, (y * scale).to(out.dtype.element_ty), mask=mask)
        tiles: tl.constexpr = (OUTPUTS + BLOCK_OUT - 1) // BLOCK_OUT
        place = new_squares + row * tiles + first // BLOCK_OUT
        tl.store(place, tl.sum(tl.where(mask, y * y, 0.0), axis=1), mask=row < rows)


@triton.jit
def gated_product_kernel(
    x, weight, weights, out, squares, partials, counters, rows, epsilon,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A gate's activation times its values, OUTPUTS of each, of rows yet to be divided (PARTS)."""
    tile, first_row, first, split = _place(rows, OUTPUTS, BLOCK_ROWS, BLOCK_OUT)
    share: tl.constexpr = (INPUTS + BLOCK_IN * SPLITS - 1) // (BLOCK_IN * SPLITS) * BLOCK_IN
    begin = split * share
    _await(weights, first_row, first, begin, INPUTS, OUTPUTS, BLOCK_OUT, share, OUTPUTS, PDL)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    output = first + tl.arange(0, BLOCK_OUT)
    found = _squares(squares, row, rows, PARTS, PARTS_TILE)
    gate, up = _multiply_pair(
        x, weight, first_row, first, OUTPUTS + first, begin, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, share
    )  # fmt: skip
    if SPLITS > 1:
        step: tl.constexpr = BLOCK_OUT * BLOCK_ROWS
        cells = _cells(partials, tile, 2 * SPLITS, BLOCK_ROWS, BLOCK_OUT)
        tl.store(cells + split * (2 * step), gate)
        tl.store(cells + split * (2 * step) + step, up)
        if not _count(counters, tile, SPLITS):
            return
        gate = _sum(cells, SPLITS, 2 * step)
        up = _sum(cells + step, SPLITS, 2 * step)
    gate, up = tl.trans(gate), tl.trans(up)
    if PARTS:
        scale = tl.rsqrt(tl.sum(found, axis=1) / INPUTS + epsilon)[:, None]
        gate *= scale
        up *= scale
    mask = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    y = (activated(gate, ACTIVATION) * up).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * OUTPUTS + output[None, :], y, mask=mask)


@triton.jit
def rotated_product_kernel(
    x, weight, weights, squares, partials, counters, positions, slots, cosines, sines, query_norm, key_norm,
    query, keys, values, rows, epsilon, head_epsilon,
    INPUTS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_TILE: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of some rows, its first and second half of BLOCK_OUT features each; normed, turned and put in place."""
    size: tl.constexpr = 2 * BLOCK_OUT
    outputs: tl.constexpr = (HEADS + 2 * KV_HEADS) * BLOCK_OUT
    tile, first_row, first, split = _place(rows, outputs, BLOCK_ROWS, BLOCK_OUT)
    share: tl.constexpr = (INPUTS + BLOCK_IN * SPLITS - 1) // (BLOCK_IN * SPLITS) * BLOCK_IN
    begin, first = split * share, 2 * first
    _await(weights, first_row, first, begin, INPUTS, 2 * outputs, BLOCK_OUT, share, BLOCK_OUT, PDL)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    found = _squares(squares, row, rows, PARTS, PARTS_TILE)
    half, other = _multiply_pair(
        x, weight, first_row, first, first + BLOCK_OUT, begin, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, share
    )  # fmt: skip
    if SPLITS > 1:
        step: tl.constexpr = BLOCK_OUT * BLOCK_ROWS
        cells = _cells(partials, tile, 2 * SPLITS, BLOCK_ROWS, BLOCK_OUT)
        tl.store(cells + split * (2 * step), half)
        tl.store(cells + split * (2 * step) + step, other)
        if not _count(counters, tile, SPLITS):
            return
        half = _sum(cells, SPLITS, 2 * step)
        other = _sum(cells + step, SPLITS, 2 * step)
    half, other = tl.trans(half), tl.trans(other)
    if PARTS:
        scale = tl.rsqrt(tl.sum(found, axis=1) / INPUTS + epsilon)[:, None]
        half *= scale
        other *= scale
    head, mask = first // size, row < rows
    feature = tl.arange(0, BLOCK_OUT)[None, :]
    if head < HEADS + KV_HEADS:
        if NORM:
            total = tl.sum(half * half, axis=1) + tl.sum(other * other, axis=1)
            inverse = tl.rsqrt(total / size + head_epsilon)[:, None]
            half *= inverse * _head_factor(query_norm, key_norm, feature, head < HEADS)
            other *= inverse * _head_factor(query_norm, key_norm, BLOCK_OUT + feature, head < HEADS)
        angle = (tl.load(positions + row, mask=mask, other=0) * size)[:, None] + feature
        half, other = _turned(half, other, cosines + angle, sines + angle, mask[:, None], BLOCK_OUT)
    if head < HEADS:
        _put(query + ((row.to(tl.int64) * HEADS + head) * size)[:, None] + feature, half, other, mask[:, None])
    else:
        slot = tl.load(slots + row, mask=mask, other=0)
        kv_head = (head - HEADS) % KV_HEADS
        place = ((slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * size
        if head < HEADS + KV_HEADS:
            _put(keys + place[:, None] + feature, half, other, mask[:, None])
        else:
            _put(values + place[:, None] + feature, half, other, mask[:, None])


@triton.jit
def _head_factor(query_norm, key_norm, feature, is_query):
    """The norm's factor of some of a head's features."""
    return tl.where(is_query, tl.load(query_norm + feature), tl.load(key_norm + feature))


@triton.jit
def _turned(half, other, cosines, sines, mask, HALF: tl.constexpr):
    """A head's first and second half, turned against each other."""
    first = half * _angles(cosines, mask) - other * _angles(sines, mask)
    return first, other * _angles(cosines + HALF, mask) + half * _angles(sines + HALF, mask)


@triton.jit
def _angles(pointers, mask):
    """Cosines or sines in float32."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(pointers, half, other, mask):
    """Write both halves of a head."""
    tl.store(pointers, half.to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + half.shape[1], other.to(pointers.dtype.element_ty), mask=mask)
