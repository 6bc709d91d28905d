"""Triton kernels of paged attention. ``attention`` calls them; importing this module imports Triton.

Keys and values of a layer lie in ``[num_blocks, kv_heads, block_size, size]``. Query heads that share a KV head are
rows of one tile, so that keys are read once for all of them. Scores are kept in units of log2, because the device
has an instruction for powers of two. Sizes in capitals are known when a kernel is compiled. Keys and values stored in
float8 are widened to the queries' dtype as they are read; their scales are factors on scores and on the output.

Where a row's keys were cut into several items, the program that ends last merges their partial results: it is the one
that counts the last of them. With PDL, a kernel is launched while its predecessor still runs, and waits for it before
it reads what that writes; until then it reads the step's plan, which lay there before the step began, and has keys and
values of earlier steps brought near.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from folo_kernels.gpu.rounding_kernels import store_rounded

FIELDS = tl.constexpr(8)
"""int32 numbers of an item and of a row (see ``plan``)."""

NEVER = tl.constexpr(float("-inf"))

NEAR = tl.constexpr(2)
"""Steps of an item's loop for which keys and values are brought near."""


@triton.jit
def _blocks(table, positions, end, BLOCK_SIZE: tl.constexpr):
    """Blocks in which the tokens at some positions before ``end`` lie."""
    return tl.load(table + positions // BLOCK_SIZE, mask=positions < end, other=0)


@triton.jit
def _cells(blocks, positions, head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """int64 places of positions among all blocks' ``[num_blocks * kv_heads * block_size]`` tokens."""
    return (blocks.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _read(base, cells, seen, SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values ``[tokens, TILE]`` of some cells; zeros where not seen, and beyond SIZE."""
    feature = tl.arange(0, TILE)
    pointers = base + cells[:, None] * SIZE + feature[None, :]
    if MASKED:
        if SIZE == TILE:
            return tl.load(pointers, mask=seen[:, None], other=0.0)
        return tl.load(pointers, mask=seen[:, None] & (feature[None, :] < SIZE), other=0.0)
    if SIZE == TILE:
        return tl.load(pointers)
    return tl.load(pointers, mask=feature[None, :] < SIZE, other=0.0)


@triton.jit
def _prefetch(base, cells, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Have the device's cache fetch some cells, unless their size is odd; nobody waits, and nothing is read yet."""
    if SIZE == TILE:
        per_line: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
        lines: tl.constexpr = (SIZE + per_line - 1) // per_line
        pointers = base + cells[:, None] * SIZE + tl.arange(0, lines)[None, :] * per_line
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _scores(q, k, factor, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores ``[rows, tokens]``: with SOFTCAP capped, in units of log2; otherwise products yet to be scaled."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if SOFTCAP:
        # tanh by a power of two; exp2 overflows to infinity, for which this is 1.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * factor) + 1.0))
    return scores


@triton.jit
def _accumulate(acc, norm, top, scores, v, factor, PRECISION: tl.constexpr):
    """One step of a softmax that sees its row piece by piece (online softmax)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen no key yet: minus infinity minus itself would be NaN.
    base = tl.where(new_top == NEVER, 0.0, new_top)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, norm * shrink + tl.sum(weights, 1), new_top


@triton.jit
def _attend_item(
    first, count, begin, end, slot, head, query, keys, values, out, partials, partial_tops, rows, table,
    query_stride, query_head_stride, out_stride, factor, cap, v_scale, window,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head of ``count`` rows over the tokens ``begin:end`` that all of them see."""
    place = tl.arange(0, TILE_ROWS)
    member = place // GROUP
    real = member < count
    query_head = head * GROUP + place % GROUP
    row = rows + (first + member) * FIELDS
    token = tl.load(row, mask=real, other=0).to(tl.int64)
    length = tl.load(row + 1, mask=real, other=0)
    if WINDOW:
        begin = tl.maximum(begin, tl.min(tl.where(real, length, 2147483647), 0) - window)
    offset = tl.arange(0, BLOCK_N)
    blocks = _blocks(table, begin + offset, end, BLOCK_SIZE)
    if PDL:
        # No more than the cache holds of all items together.
        for start in range(begin, tl.minimum(end, begin + NEAR * BLOCK_N), BLOCK_N):
            position = tl.minimum(start + offset, end - 1)
            cells = _cells(_blocks(table, position, end, BLOCK_SIZE), position, head, KV_HEADS, BLOCK_SIZE)
            _prefetch(keys, cells, KEY_SIZE, KEY_TILE)
            _prefetch(values, cells, VALUE_SIZE, VALUE_TILE)
        gdc_wait()
    feature = tl.arange(0, KEY_TILE)
    q_rows = query + token * query_stride + query_head * query_head_stride
    q = tl.load(q_rows[:, None] + feature[None, :], mask=real[:, None] & (feature < KEY_SIZE)[None, :], other=0.0)
    acc = tl.zeros([TILE_ROWS, VALUE_TILE], tl.float32)
    norm = tl.zeros([TILE_ROWS], tl.float32)
    top = tl.full([TILE_ROWS], NEVER, tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + offset
        seen = position < end
        cells = _cells(blocks, position, head, KV_HEADS, BLOCK_SIZE)
        # A step ahead, so that the addresses of keys never wait for memory.
        blocks = _blocks(table, position + BLOCK_N, end, BLOCK_SIZE)
        k = _read(keys, cells, seen, KEY_SIZE, KEY_TILE, True)
        scores = _scores(q, k, factor, cap, SOFTCAP, PRECISION)
        visible = seen[None, :]
        if WINDOW:
            visible = visible & (position[None, :] >= (length - window)[:, None])
        scores = tl.where(visible, scores, NEVER)
        v = _read(values, cells, seen, VALUE_SIZE, VALUE_TILE, True).to(q.dtype)
        acc, norm, top = _accumulate(acc, norm, top, scores, v, 1.0 if SOFTCAP else factor, PRECISION)
    acc = acc * (v_scale / tl.where(norm == 0.0, 1.0, norm))[:, None]
    feature = tl.arange(0, VALUE_TILE)
    mask = real[:, None] & (feature < VALUE_SIZE)[None, :]
    if slot < 0:
        target = out + token * out_stride + query_head * VALUE_SIZE
        tl.store(target[:, None] + feature[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        part = (slot + member).to(tl.int64) * (KV_HEADS * GROUP) + query_head
        tl.store(partials + part[:, None] * VALUE_SIZE + feature[None, :], acc, mask=mask)
        tl.store(partial_tops + part, tl.where(norm == 0.0, NEVER, top + tl.log2(norm)), mask=real)


@triton.jit
def decode_kernel(
    query, keys, values, out, partials, partial_tops, counters, header, items, rows, tables,
    query_stride, query_head_stride, out_stride, factor, cap, v_scale, window,
    ROW_TILE: tl.constexpr, SHARED_TILE: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARED_BLOCK_N: tl.constexpr, GROUP_TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(head, i)``: item ``i`` of the step, one KV head. Programs beyond the step's items are idle."""
    head = tl.program_id(0)
    index = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    if index >= tl.load(header):
        return
    item = items + index * FIELDS
    first = tl.load(item)
    count = tl.load(item + 1)
    begin = tl.load(item + 2)
    end = tl.load(item + 3)
    slot = tl.load(item + 4)
    table = tables + first.to(tl.int64) * tl.load(header + 1)
    row = rows + first * FIELDS
    token, own, num_own, shared, stride, num_shared = _row(row)
    if HAS_SHARED:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if count > 1:
            _attend_item(
                first, count, begin, end, slot, head, query, keys, values, out, partials, partial_tops, rows, table,
                query_stride, query_head_stride, out_stride, factor, cap, v_scale, window,
                SHARED_TILE, SHARED_BLOCK_N, GROUP, KV_HEADS, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
                SOFTCAP, WINDOW, PDL, PRECISION,
            )  # fmt: skip
            _count_chunk(
                first, count, head, counters, rows, out, partials, partial_tops, out_stride,
                SHARED_TILE, GROUP, GROUP_TILE, KV_HEADS, VALUE_SIZE, VALUE_TILE, PARTS,
            )  # fmt: skip
            return
    _attend_item(
        first, count, begin, end, slot, head, query, keys, values, out, partials, partial_tops, rows, table,
        query_stride, query_head_stride, out_stride, factor, cap, v_scale, window,
        ROW_TILE, BLOCK_N, GROUP, KV_HEADS, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
        SOFTCAP, WINDOW, PDL, PRECISION,
    )  # fmt: skip
    if slot >= 0:
        # All warps must have stored their share before one of them counts it.
        tl.debug_barrier()
        counter = counters + first * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_own + num_shared - 1:
            _merge(
                token, own, num_own, shared, stride, num_shared, head, out, partials, partial_tops, out_stride,
                GROUP, GROUP_TILE, KV_HEADS, VALUE_SIZE, VALUE_TILE, PARTS,
            )  # fmt: skip
            # The next layer, and the next replay of a graph, count from zero.
            tl.store(counter, 0)


@triton.jit
def _row(row):
    """A row's first token, and where its own partial results and its chunk's are: first slots, stride and numbers."""
    return (
        tl.load(row), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    )  # fmt: skip


@triton.jit
def _count_chunk(
    first, count, head, counters, rows, out, partials, partial_tops, out_stride,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, KV_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Count a partial result of each of a chunk's rows, and merge those of which it is the last.

    Few are: the rows' own items are shorter, so that they come later.
    """
    member = tl.arange(0, MEMBERS)
    real = member < count
    row = rows + (first + member) * FIELDS
    total = tl.load(row + 3, mask=real, other=0) + tl.load(row + 6, mask=real, other=0)
    counter = counters + (first + member) * KV_HEADS + head
    tl.debug_barrier()
    found = tl.atomic_add(counter, 1, mask=real, sem="acq_rel")
    is_last = (real & (found == total - 1)).to(tl.int32)
    # What a warp has counted must be known to all of them before one reads.
    tl.debug_barrier()
    if tl.max(is_last, 0) > 0:
        for place in range(count):
            if tl.sum(tl.where(member == place, is_last, 0), 0) > 0:
                token, own, num_own, shared, stride, num_shared = _row(rows + (first + place) * FIELDS)
                _merge(
                    token, own, num_own, shared, stride, num_shared, head, out, partials, partial_tops, out_stride,
                    GROUP, GROUP_TILE, KV_HEADS, VALUE_SIZE, VALUE_TILE, PARTS,
                )  # fmt: skip
        tl.store(counter, 0, mask=is_last > 0)


@triton.jit
def _merge(
    token, own, num_own, shared, stride, num_shared, head, out, partials, partial_tops, out_stride,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr,
    VALUE_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row's output of a KV head's query heads. Parts are added in their tokens' order, whichever ended last."""
    total = num_shared + num_own
    place = tl.arange(0, GROUP_TILE)
    query_head = head * GROUP + place
    feature = tl.arange(0, VALUE_TILE)
    exists = (place < GROUP)[:, None] & (feature < VALUE_SIZE)[None, :]
    acc = tl.zeros([GROUP_TILE, VALUE_TILE], tl.float32)
    norm = tl.zeros([GROUP_TILE], tl.float32)
    top = tl.full([GROUP_TILE], NEVER, tl.float32)
    for start in range(0, total, PARTS):
        index = start + tl.arange(0, PARTS)
        slot = tl.where(index < num_shared, shared + index * stride, own + index - num_shared)
        part = slot.to(tl.int64)[:, None] * (KV_HEADS * GROUP) + query_head[None, :]
        real = (index < total)[:, None] & (place < GROUP)[None, :]
        # Other processors wrote them: what this one may have cached is passed over.
        tops = tl.load(partial_tops + part, mask=real, other=NEVER, cache_modifier=".cg")
        pointers = partials + part[:, :, None] * VALUE_SIZE + feature[None, None, :]
        found = tl.load(pointers, mask=real[:, :, None] & exists[None, :, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == NEVER, 0.0, new_top)
        weights = tl.exp2(tops - base[None, :])
        shrink = tl.exp2(top - base)
        acc = acc * shrink[:, None] + tl.sum(found * weights[:, :, None], 0)
        norm = norm * shrink + tl.sum(weights, 0)
        top = new_top
    acc = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    target = out + token.to(tl.int64) * out_stride + query_head[:, None] * VALUE_SIZE + feature[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _attend_run(
    acc, norm, top, q, keys, values, table, head, begin, end, position, factor, cap, window,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries at ``position`` over the tokens ``begin:end``, each up to its own; all of them unless MASKED."""
    offset = tl.arange(0, BLOCK_N)
    blocks = _blocks(table, begin + offset, end, BLOCK_SIZE)
    for start in range(begin, end, BLOCK_N):
        key_position = start + offset
        seen = key_position < end
        cells = _cells(blocks, key_position, head, KV_HEADS, BLOCK_SIZE)
        blocks = _blocks(table, key_position + BLOCK_N, end, BLOCK_SIZE)
        k = _read(keys, cells, seen, KEY_SIZE, KEY_TILE, MASKED)
        scores = _scores(q, k, factor, cap, SOFTCAP, PRECISION)
        if MASKED:
            visible = key_position[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (key_position[None, :] > (position - window)[:, None])
            scores = tl.where(visible, scores, NEVER)
        v = _read(values, cells, seen, VALUE_SIZE, VALUE_TILE, MASKED).to(q.dtype)
        acc, norm, top = _accumulate(acc, norm, top, scores, v, 1.0 if SOFTCAP else factor, PRECISION)
    return acc, norm, top


@triton.jit
def prefill_kernel(
    query, keys, values, out, header, rows, tables, tiles,
    query_stride, query_head_stride, out_stride, factor, cap, v_scale, window,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(head, i)``: tile ``i`` of the step, up to TOKENS new tokens of a sequence, one KV head."""
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 2
    index = tl.load(tile)
    first = tl.load(tile + 1)
    row = rows + index * FIELDS
    length = tl.load(row + 1)
    new = tl.load(row + 7)
    table = tables + index.to(tl.int64) * tl.load(header + 1)
    place = tl.arange(0, BLOCK_M)
    number = first + place // GROUP
    real = (place < TOKENS * GROUP) & (number < new)
    position = length - new + number
    query_head = head * GROUP + place % GROUP
    token = (tl.load(row) + number).to(tl.int64)
    feature = tl.arange(0, KEY_TILE)
    q_rows = query + token * query_stride + query_head * query_head_stride
    q = tl.load(q_rows[:, None] + feature[None, :], mask=real[:, None] & (feature < KEY_SIZE)[None, :], other=0.0)
    # Tokens full_begin:full_end are seen by every query of the tile, so that nothing need be masked there.
    oldest = length - new + first
    end = tl.minimum(length, oldest + TOKENS)
    begin = oldest * 0
    full_begin = begin
    if WINDOW:
        begin = tl.maximum(oldest - window + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum((oldest + 1) // BLOCK_N * BLOCK_N, begin)
    full_begin = tl.minimum(full_begin, full_end)
    acc = tl.zeros([BLOCK_M, VALUE_TILE], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEVER, tl.float32)
    if WINDOW:
        acc, norm, top = _attend_run(
            acc, norm, top, q, keys, values, table, head, begin, full_begin, position, factor, cap, window,
            True, BLOCK_N, KV_HEADS, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    acc, norm, top = _attend_run(
        acc, norm, top, q, keys, values, table, head, full_begin, full_end, position, factor, cap, window,
        False, BLOCK_N, KV_HEADS, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE, SOFTCAP, WINDOW, PRECISION,
    )  # fmt: skip
    acc, norm, top = _attend_run(
        acc, norm, top, q, keys, values, table, head, full_end, end, position, factor, cap, window,
        True, BLOCK_N, KV_HEADS, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE, SOFTCAP, WINDOW, PRECISION,
    )  # fmt: skip
    acc = acc * (v_scale / tl.where(norm == 0.0, 1.0, norm))[:, None]
    feature = tl.arange(0, VALUE_TILE)
    target = out + token * out_stride + query_head * VALUE_SIZE
    mask = real[:, None] & (feature < VALUE_SIZE)[None, :]
    tl.store(target[:, None] + feature[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_kernel(
    key, value, slots, keys, values, key_stride, key_head_stride, value_stride, value_head_stride,
    key_factor, value_factor,
    KV_HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program ``i``: write token ``i``'s keys and values of all heads, times their factors, into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.arange(0, HEADS_TILE)
    cell = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    feature = tl.arange(0, KEY_TILE)[None, :]
    mask = (head < KV_HEADS)[:, None] & (feature < KEY_SIZE)
    new = tl.load(key + token * key_stride + head[:, None] * key_head_stride + feature, mask=mask)
    store_rounded(keys + cell[:, None] * KEY_SIZE + feature, new.to(tl.float32) * key_factor, mask)
    feature = tl.arange(0, VALUE_TILE)[None, :]
    mask = (head < KV_HEADS)[:, None] & (feature < VALUE_SIZE)
    new = tl.load(value + token * value_stride + head[:, None] * value_head_stride + feature, mask=mask)
    store_rounded(values + cell[:, None] * VALUE_SIZE + feature, new.to(tl.float32) * value_factor, mask)
