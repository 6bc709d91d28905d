"""The sdpa backend equals dense float64 attention, whatever the blocks, the chunks and the neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_harness import TOLERANCE, Case, Harness, cases, check
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_attention.plugin import folo_attention_backends
from folo_core.attention.interface import AttentionBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@settings(max_examples=120, deadline=None)
@given(cases())
def test_equals_dense_attention_amid_nan(case):
    """All slots but the sequences' own hold NaN throughout, so equality also proves that none of them is read."""
    check(Harness(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0), (9, 5.0)])
def test_every_dtype(device, dtype, window, softcap):
    chunks = [[30, 1, 1, 7], [1, 1, 1], [5, 1, 40, 1], [64, 1]] * 3
    case = Case(16, 2, 3, 64, 64, chunks, window, softcap, scattered=True, seed=3)
    check(Harness(case, dtype=dtype, device=device), dtype)


@pytest.mark.parametrize("scattered", [True, False])
def test_long_prompt_is_cut_into_tiles(scattered):
    case = Case(16, 1, 2, 8, 8, [[600, 1], [300, 290]], None, None, scattered, seed=1)
    harness = Harness(case)
    tiles = harness.metadata([(0, 0, 600)]).plan.prefill_tiles(None)
    assert [tile.rows.stop - tile.rows.start for tile in tiles] == [256, 256, 88]
    assert all(isinstance(tile.slots, slice) is not scattered for tile in tiles)
    check(harness)


def test_consecutive_blocks_are_read_in_place():
    case = Case(4, 1, 1, 4, 4, [[9]], None, None, scattered=False, seed=0)
    harness = Harness(case)
    (tile,) = harness.metadata([(0, 8, 9)]).plan.decode_tiles(None)
    assert tile.slots == slice(4, 13)
    keys, values = harness.backend._keys[0], harness.backend._values[0]
    read = harness.backend._read(keys, values, tile)
    assert [tensor.data_ptr() for tensor in read] == [keys[4].data_ptr(), values[4].data_ptr()]


def test_gathered_tiles_reuse_their_memory():
    case = Case(4, 1, 1, 4, 4, [[50], [90]], None, None, scattered=True, seed=0)
    harness = Harness(case)
    places = []
    for _ in range(2):
        for sequence, length in enumerate(case.lengths):
            harness.step([(sequence, length - 1, length)], layer=0)
            places.append(harness.backend._scratch["keys"].data_ptr())
    assert len(set(places[1:])) == 1


def test_window_reads_only_its_own_blocks():
    case = Case(4, 1, 1, 4, 4, [[100]], 6, None, scattered=True, seed=0)
    (tile,) = Harness(case).metadata([(0, 99, 100)]).plan.decode_tiles(6)
    assert tile.slots.shape == (6,)


def test_decode_rows_of_like_length_share_a_call():
    chunks = [[length] for length in [50, 51, 52, 53, 10, 11, 300]]
    case = Case(16, 1, 1, 4, 4, chunks, None, None, scattered=True, seed=0)
    plan = Harness(case).metadata([(i, sum(c) - 1, sum(c)) for i, c in enumerate(chunks)]).plan
    assert plan.decode_rows.tolist() == [4, 5, 0, 1, 2, 3, 6]
    assert [tile.rows for tile in plan.decode_tiles(None)] == [slice(0, 2), slice(2, 6), slice(6, 7)]
    assert not plan.prefill_tiles(None)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 9))
def test_batches_cover_all_rows_with_little_padding(lengths, most):
    from folo_attention.planning import MAX_PADDING, batches

    lengths = np.sort(np.array(lengths, dtype=np.int64))
    runs = list(batches(lengths, most))
    assert [row for first, last in runs for row in range(first, last)] == list(range(len(lengths)))
    for first, last in runs:
        width = lengths[last - 1] * (last - first)
        assert 1 <= last - first <= most
        assert width - lengths[first:last].sum() <= MAX_PADDING * width


def test_a_nan_in_one_sequence_stays_there():
    case = Case(4, 2, 2, 8, 8, [[6], [6], [6]], None, None, scattered=True, seed=5)
    harness = Harness(case)
    harness.step([(0, 0, 6), (1, 0, 5), (2, 0, 5)])
    harness.keys[1][4] = math.nan
    harness.step([(1, 4, 5)])
    (_, poisoned), (got, wanted) = harness.step([(1, 5, 6), (2, 5, 6)])
    assert poisoned.isnan().all()
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


def test_layers_are_apart():
    case = Case(4, 1, 1, 4, 4, [[6]], None, None, scattered=True, seed=5)
    harness = Harness(case)
    harness.step([(0, 0, 6)], layer=1)
    assert harness.backend._keys[0][: harness.num_blocks * 4].isnan().all()


def test_copied_blocks_serve_a_fork_and_the_parent_keeps_its_own():
    case = Case(4, 1, 2, 8, 8, [[7], [1]], None, None, scattered=False, seed=2)
    harness = Harness(case)
    harness.step([(0, 0, 7)])
    harness.tables[1, :2] = harness.num_blocks - 2, harness.num_blocks - 1
    harness.backend.copy_blocks(harness.tables[0, :2].tolist(), harness.tables[1, :2].tolist())
    for tensors in (harness.queries, harness.keys, harness.values):
        tensors[1] = torch.cat([tensors[0][:6], torch.randn_like(tensors[0][:1])])
    for index in (1, 0):  # the child writes its own last token first
        ((got, wanted),) = harness.step([(index, 6, 7)])
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


def test_zeroed_blocks_are_zero_and_others_are_not():
    case = Case(4, 1, 1, 4, 4, [[12]], None, None, scattered=False, seed=2)
    harness = Harness(case)
    for layer in (0, 1):
        harness.step([(0, 0, 12)], layer=layer)
    harness.backend.zero_blocks([1, 3])
    for cache in (*harness.backend._keys, *harness.backend._values):
        blocks = cache[:-1].view(-1, 4, 1, 4)
        assert not blocks[[1, 3]].any()
        assert blocks[2].all()


def test_no_blocks_to_copy_or_zero_is_no_error():
    harness = Harness(Case(4, 1, 1, 4, 4, [[2]], None, None, scattered=False, seed=2))
    harness.backend.copy_blocks([], [])
    harness.backend.zero_blocks([])


def test_a_foreign_plan_is_refused_by_name():
    harness = Harness(Case(4, 1, 1, 4, 4, [[2]], None, None, scattered=False, seed=2))
    metadata = harness.metadata([(0, 0, 2)])
    metadata.plan = None
    with pytest.raises(TypeError, match=r"metadata\.plan: NoneType"):
        harness.backend.forward(0, harness.queries[0], harness.keys[0], harness.values[0], metadata, scale=1.0)


def test_the_plugin_offers_the_backend():
    spec = folo_attention_backends()[0]
    assert spec.name == "sdpa"
    assert isinstance(spec.factory(None), AttentionBackend)
    assert spec.supports("cpu", "float32") is None
    assert spec.supports("cuda:1", "bfloat16") is None
    assert "tpu" in spec.supports("tpu", "float32")
    assert "int8" in spec.supports("cpu", "int8")
