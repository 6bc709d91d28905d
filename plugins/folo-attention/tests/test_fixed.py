"""The fixed-order backend equals dense attention, and a row is the same bits whatever else is in the step."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from attention_harness import Case, Harness, cases, check
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_attention import fixed
from folo_attention.fixed import KEY_TILE, FixedOrderBackend, stable_rows
from folo_attention.plugin import folo_attention_backends
from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import AttentionBackend
from folo_core.errors import ConfigError

CHUNKS = (1, 1, 2, 5, 17, 40, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 300)
MIXED = Case(
    16, 2, 3, 64, 64, [[30, 1, 1, 7], [1, 1, 1], [5, 1, 200, 1], [64, 90, 1]] * 3, None, None, scattered=True, seed=3
)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(cases(CHUNKS))
def test_equals_dense_attention_amid_nan(case):
    """All slots but the sequences' own hold NaN throughout, so equality also proves that none of them is read."""
    check(Harness(case, backend=FixedOrderBackend))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0), (150, 5.0)])
def test_windows_and_softcaps_over_several_tiles(window, softcap):
    check(Harness(attrs.evolve(MIXED, window=window, softcap=softcap), backend=FixedOrderBackend))


def in_chunks(case, backend=FixedOrderBackend):
    """Every row of every sequence, from steps in which chunks of some sequences meet."""
    harness = Harness(case, backend=backend)
    found = [[] for _ in case.chunks]
    for parts in harness.steps():
        for (sequence, *_), output in zip(parts, harness.run(parts), strict=True):
            found[sequence].append(output)
    return list(map(torch.cat, found))


def alone(case, backend=FixedOrderBackend, chunk=1):
    """Every row of every sequence, each sequence for itself, ``chunk`` tokens a step."""
    harness = Harness(case, backend=backend)
    return [
        torch.cat([
            *[harness.run([(i, begin, min(begin + chunk, length))])[0] for begin in range(0, length, chunk)]
        ])
        for i, length in enumerate(case.lengths)
    ]  # fmt: skip


def assert_same_bits(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(cases(CHUNKS), st.booleans(), st.sampled_from([1, 4, 16]))
def test_chunks_and_neighbours_and_layout_change_no_bit(case, scattered, block_size):
    wanted = in_chunks(case)
    whole = attrs.evolve(case, scattered=scattered, block_size=block_size)
    assert_same_bits(alone(whole, chunk=10**6), wanted)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decoding_gives_the_bits_of_prefill(window, softcap, threads):
    """What a sequence is recomputed to after a preemption is what it was."""
    case = attrs.evolve(MIXED, window=window, softcap=softcap)
    wanted = in_chunks(case)
    for chunk in (1, 10, 10**6):
        assert_same_bits(alone(case, chunk=chunk), wanted)


@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), [(1, 1, 17, 17), (3, 3, 64, 64), (2, 7, 80, 12)])
def test_the_number_of_threads_changes_no_bit(heads, groups, size, value_size):
    case = attrs.evolve(MIXED, kv_heads=heads, groups=groups, head_size=size, v_head_size=value_size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = in_chunks(case)
        torch.set_num_threads(2)
        assert_same_bits(in_chunks(case), wanted)
        assert_same_bits(alone(case, chunk=50), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_other_slots_hold_changes_no_bit():
    harnesses = [Harness(MIXED, backend=FixedOrderBackend) for _ in range(2)]
    for cache in (*harnesses[1].backend._keys, *harnesses[1].backend._values):
        cache[:-1] = 1e30
    for parts in harnesses[0].steps():
        assert_same_bits(*[harness.run(parts) for harness in harnesses])


def test_a_nan_in_one_sequence_stays_there():
    case = attrs.evolve(MIXED, chunks=[[140, 1], [140, 1]])
    clean, harness = (Harness(case, backend=FixedOrderBackend) for _ in range(2))
    harness.keys[0][3] = math.nan
    for parts in ([(0, 0, 140), (1, 0, 140)], [(0, 140, 141), (1, 140, 141)]):
        poisoned, healthy = harness.run(parts)
        assert poisoned[-1].isnan().all()
        assert_same_bits([healthy], clean.run(parts)[1:])


def test_the_default_backend_does_differ():
    """Else the tests above would prove nothing."""
    wanted = in_chunks(MIXED, SdpaBackend)
    found = alone(MIXED, SdpaBackend)
    assert any(not torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_sequences_of_as_many_tiles_share_a_call():
    chunks = [[length] for length in [50, KEY_TILE, 10, KEY_TILE + 1, 2 * KEY_TILE, *[5] * 8]]
    case = Case(16, 1, 1, 4, 4, chunks, None, None, scattered=True, seed=0)
    harness = Harness(case, backend=FixedOrderBackend)
    calls = harness.metadata([(i, length - 1, length) for i, (length,) in enumerate(chunks)]).plan.calls(None)
    assert [call.rows.tolist() for call in calls] == [[0, 1, 2, *range(5, 10)], [10, 11, 12], [3, 4]]
    assert [tuple(call.slots.shape) for call in calls] == [(8, KEY_TILE), (3, KEY_TILE), (2, 2 * KEY_TILE)]


def test_a_window_reads_only_its_own_tiles():
    case = Case(4, 1, 1, 4, 4, [[5 * KEY_TILE]], 6, None, scattered=True, seed=0)
    harness = Harness(case, backend=FixedOrderBackend)
    (call,) = harness.metadata([(0, 5 * KEY_TILE - 1, 5 * KEY_TILE)]).plan.calls(6)
    assert call.slots.shape == (1, KEY_TILE)
    assert (call.slots == harness.backend._num_slots).sum() == KEY_TILE - 6


def test_a_foreign_plan_is_refused_by_name():
    harness = Harness(attrs.evolve(MIXED, chunks=[[2]]), backend=FixedOrderBackend)
    metadata = harness.metadata([(0, 0, 2)])
    metadata.plan = None
    with pytest.raises(TypeError, match=r"metadata\.plan: NoneType"):
        harness.backend.forward(0, harness.queries[0], harness.keys[0], harness.values[0], metadata, scale=1.0)


def test_rows_are_padded_as_far_as_this_processor_needs(monkeypatch):
    inner, needed = torch.bmm, 16

    def bmm(left, right):
        rows = left.shape[1]
        return inner(left, right) + (0 if rows % needed == 0 else rows)

    monkeypatch.setattr(torch, "bmm", bmm)
    assert stable_rows(8, 8, torch.float32) == 16
    needed = 7
    with pytest.raises(ConfigError, match=r"heads of 8 and 6.*OMP_NUM_THREADS=1"):
        stable_rows(8, 6, torch.float32)


def test_trying_leaves_the_number_of_threads(threads):
    assert stable_rows(64, 64, torch.float32) in fixed.MULTIPLES
    assert torch.get_num_threads() == threads


def test_the_plugin_offers_the_backend():
    default, _, spec, _ = folo_attention_backends()
    assert spec.name == "fixed-order"
    assert "batch-invariant" in spec.capabilities - default.capabilities
    assert spec.priority < default.priority, "auto takes it only where it must"
    assert isinstance(spec.factory(None), AttentionBackend)
    assert spec.supports("cpu", "float32") is None
    assert "cuda:1" in spec.supports("cuda:1", "float32")
    assert "bfloat16" in spec.supports("cpu", "bfloat16")
