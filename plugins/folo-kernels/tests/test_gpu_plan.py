"""A plan covers every row's tokens once, within the room that is made for it, and finds what rows share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_kernels.gpu.plan import Tuning, common_blocks, cut, groups
from folo_kernels.gpu.staging import RING, Layout, Stager

SIZE = 16


def tables_of(lens, shared):
    """Block tables in which row i has its first ``shared[i]`` full blocks in common with the row before."""
    width = max(1, -(-int(lens.max()) // SIZE))
    tables = np.arange(1, lens.size * width + 1, dtype=np.int32).reshape(lens.size, width)
    for i in range(1, len(lens)):
        common = min(shared[i], lens[i] // SIZE, lens[i - 1] // SIZE)
        tables[i, :common] = tables[i - 1, :common]
    return tables


@st.composite
def steps(draw):
    lens = np.array(draw(st.lists(st.integers(0, 3000), min_size=1, max_size=40)), np.int32)
    shared = draw(st.lists(st.sampled_from([0, 0, 7, 8, 64, 500]), min_size=len(lens), max_size=len(lens)))
    several = draw(st.lists(st.sampled_from([1, 1, 1, 5, 200]), min_size=len(lens), max_size=len(lens)))
    counts = np.where(lens > 0, np.minimum(several, np.maximum(lens, 1)), 1)
    tuning = Tuning(
        kv_heads=draw(st.sampled_from([1, 8, 16])),
        group=draw(st.sampled_from([1, 2, 3, 8, 64, 100])),
        min_split=draw(st.sampled_from([1, 64, 256])),
        processors=draw(st.sampled_from([1, 132])),
    )
    return np.cumsum([0, *counts]).astype(np.int32), lens, tables_of(lens, shared), tuning


@given(steps())
def test_items_and_tiles_cover_what_each_row_sees(step):
    query_start, lens, tables, tuning = step
    work = cut(query_start, lens, tables, SIZE, tuning)
    counts = np.diff(query_start)
    seen = [np.zeros(length, int) for length in lens]
    for first, rows, begin, end, *_ in work.items.tolist():
        assert rows * tuning.group <= max(tuning.shared_rows, tuning.group)
        for row in range(first, first + rows):
            blocks = slice(begin // SIZE, -(-end // SIZE) if rows == 1 else end // SIZE)
            assert (tables[row, blocks] == tables[first, blocks]).all()
            seen[row][begin:end] += 1
    for row, count in enumerate(counts):
        assert (seen[row] == (1 if count == 1 else 0)).all()
    queries = [np.zeros(count, int) for count in counts]
    for row, first in work.tiles.tolist():
        queries[row][first : first + tuning.tokens_per_tile] += 1
    assert all((found == (count > 1)).all() for found, count in zip(queries, counts, strict=True))


@given(steps())
def test_each_row_merges_its_own_items_from_slots_that_no_other_has(step):
    query_start, lens, tables, tuning = step
    work = cut(query_start, lens, tables, SIZE, tuning)
    parts: dict[int, set[int]] = {}
    for first, rows, _, _, slot, *_ in work.items.tolist():
        for member in range(rows):
            parts.setdefault(first + member, set()).add(slot + member if slot >= 0 else -1)
    taken: set[int] = set()
    for row, (_, _, own, own_n, shared, stride, shared_n, new) in enumerate(work.rows.tolist()):
        found = parts.get(row, set())
        if own_n < 0:
            assert found == ({-1} if new == 1 else set())
            continue
        assert found == set(range(own, own + own_n)) | set(range(shared, shared + shared_n * stride, max(1, stride)))
        assert found, "whoever counts the last of none would never come"
        assert not found & taken
        taken |= found
    assert all(slot < work.num_slots for slot in taken)


@given(steps())
def test_a_step_fits_the_room_for_its_rows(step):
    query_start, lens, tables, tuning = step
    work = cut(query_start, lens, tables, SIZE, tuning)
    assert len(work.items) <= tuning.item_room(len(lens))
    assert work.num_slots <= tuning.slot_room(len(lens))
    lengths = work.items[:, 3] - work.items[:, 2]
    assert (np.diff(lengths) <= 0).all(), "the longest come first"
    sees = lens[work.tiles[:, 0]] - np.diff(query_start)[work.tiles[:, 0]] + work.tiles[:, 1]
    assert (np.diff(sees) <= 0).all()


def test_sixteen_groups_of_sixteen_are_found():
    lens = np.full(256, 1100, np.int32)
    shared = [0 if i % 16 == 0 else 64 for i in range(256)]
    work = cut(np.arange(257, dtype=np.int32), lens, tables_of(lens, shared), SIZE, Tuning(kv_heads=8, group=2))
    together = work.items[work.items[:, 1] > 1]
    assert set(together[:, 0]) == set(range(0, 256, 16))
    assert set(together[:, 1]) == {16}
    assert together[:, 3].max() == 1024


def test_items_of_a_full_step_are_of_one_length_and_fill_the_device():
    lens = np.full(64, 4096, np.int32)
    work = cut(np.arange(65, dtype=np.int32), lens, tables_of(lens, [0] * 64), SIZE, Tuning(kv_heads=8, group=2))
    assert set(work.items[:, 3] - work.items[:, 2]) == {1024}
    assert len(work.items) * 8 >= 3 * 132 * 4


def test_one_short_row_is_one_item_that_writes_the_output():
    lens = np.array([128], np.int32)
    work = cut(np.array([0, 1], np.int32), lens, tables_of(lens, [0]), SIZE, Tuning(kv_heads=8, group=2))
    assert work.items.tolist() == [[0, 1, 0, 128, -1, 0, 0, 0]]


def test_few_rows_are_cut_finer_than_many():
    for rows, split in ((1, 128), (16, 128), (17, 256)):
        lens = np.full(rows, 512, np.int32)
        query_start = np.arange(rows + 1, dtype=np.int32)
        work = cut(query_start, lens, tables_of(lens, [0] * rows), SIZE, Tuning(kv_heads=8, group=2))
        assert set(work.items[:, 3] - work.items[:, 2]) == {split}


def test_a_padding_row_is_an_item_of_no_tokens_that_writes_zeros():
    lens = np.array([0, 40, 0], np.int32)
    work = cut(np.arange(4, dtype=np.int32), lens, tables_of(lens, [0] * 3), SIZE, Tuning(kv_heads=8, group=2))
    assert work.items[1:].tolist() == [[0, 1, 0, 0, -1, 0, 0, 0], [2, 1, 0, 0, -1, 0, 0, 0]]
    assert work.rows[:, 3].tolist() == [-1, -1, -1]


def test_a_plan_in_memory_of_its_own_is_put_there_once():
    stager = Stager(SIZE, torch.device("cpu"), max_rows=1, max_width=1, tuning=Tuning(kv_heads=1, group=1))
    small = stager.plan(np.array([0, 1], np.int32), np.array([5], np.int32), np.ones((1, 1), np.int32))
    large = stager.plan(np.array([0, 1], np.int32), np.array([1000], np.int32), np.ones((1, 63), np.int32))
    place, turn = large.device.data_ptr(), stager._turn
    for plan in (small, large):
        stager.put(plan)
    assert (large.device.data_ptr(), stager._turn) == (place, turn)
    stager.regroup(large, 2)
    assert stager._turn != turn
    assert large.part("header")[1] == 63


@given(st.lists(st.integers(0, 5), max_size=9))
def test_groups_save_as_much_as_those_of_any_least_length(common):
    """Groups are runs of rows; each saves its shared blocks once for every row but its first."""
    found = groups(np.array(common, np.int64))
    ends = [first + rows for first, rows, _ in found]
    assert all(end <= first for end, (first, *_) in zip(ends, found[1:], strict=False)), "a row is in one group"
    assert all(shared == min(common[first : first + rows - 1]) > 0 for first, rows, shared in found)
    saved = sum((rows - 1) * shared for _, rows, shared in found)
    for least in range(1, 6):
        runs = "".join("x" if shared >= least else " " for shared in common).split()
        assert saved >= least * sum(map(len, runs))


def test_a_short_or_unlike_prefix_is_not_shared():
    tables = np.array([[1, 2, 3], [1, 2, 4], [9, 2, 4], [9, 2, 4]], np.int32)
    full = np.array([3, 3, 3, 2])
    assert common_blocks(np.arange(4), full, tables, 2).tolist() == [2, 0, 2]
    assert common_blocks(np.arange(4), full, tables, 3).tolist() == [0, 0, 0]
    assert common_blocks(np.array([0, 2, 3]), full, tables, 1).tolist() == [0, 0, 2]


def test_parts_lie_where_the_number_of_rows_says():
    tuning = Tuning(kv_heads=8, group=2)
    layouts = {Layout.of(8, width, 0, tuning).tables for width in (1, 30, 700)}
    assert len(layouts) == 1
    assert Layout.of(8, 30, 5, tuning).tiles % 8 == 0


def test_a_plan_stays_until_another_is_put_in_its_place():
    stager = Stager(SIZE, torch.device("cpu"), max_rows=4, max_width=10, tuning=Tuning(kv_heads=1, group=1))
    plans = [
        stager.plan(np.array([0, 1], np.int32), np.array([length], np.int32), np.ones((1, 10), np.int32))
        for length in range(1, RING + 3)
    ]
    assert plans[-1].part("rows")[1] == RING + 2
    stager.put(plans[0])
    assert plans[0].part("rows")[1] == 1
    assert len({plan.part("items").data_ptr() for plan in plans}) == 1
