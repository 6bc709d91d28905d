"""The sdpa backend equals dense float64 attention, whatever the blocks, the chunks and the neighbours."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_attention.plugin import folo_attention_backends
from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import AttentionBackend, AttentionMetadata, KVCacheSpec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def dense(query, key, value, *, scale, window, softcap):  # noqa: PLR0913 (what attention depends on)
    """Causal attention of one sequence's last tokens, head by head, in float64."""
    n, heads, _ = query.shape
    m, kv_heads, _ = key.shape
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros(n, heads, value.shape[2], dtype=torch.float64)
    for row in range(n):
        position = m - n + row
        begin = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = key[begin : position + 1, kv] @ query[row, head] * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            output[row, head] = torch.softmax(scores, 0) @ value[begin : position + 1, kv]
    return output


@attrs.frozen
class Case:
    block_size: int
    kv_heads: int
    groups: int
    head_size: int
    v_head_size: int
    chunks: list[list[int]]  # one list of chunk lengths for each sequence
    window: int | None
    softcap: float | None
    scattered: bool
    seed: int

    @property
    def lengths(self):
        return [sum(chunks) for chunks in self.chunks]


@st.composite
def cases(draw):
    head_size = draw(st.sampled_from([4, 8, 17, 64]))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 4, 16])),
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 4)),
        head_size=head_size,
        v_head_size=draw(st.sampled_from([head_size, head_size, 6])),
        chunks=draw(
            st.lists(st.lists(st.sampled_from([1, 1, 2, 5, 17, 40]), min_size=1, max_size=4), min_size=1, max_size=12)
        ),
        window=draw(st.sampled_from([None, None, 1, 3, 16, 100])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        scattered=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


class Harness:
    """A backend with its own blocks, all unused slots of which hold NaN."""

    def __init__(self, case, *, dtype=torch.float32, device="cpu"):
        self.case, self.device = case, torch.device(device)
        self.random = np.random.default_rng(case.seed)
        torch.manual_seed(case.seed)
        size = case.block_size
        needed = [-(-length // size) for length in case.lengths]
        self.num_blocks = sum(needed) + 3
        free = np.arange(1, self.num_blocks)
        if case.scattered:
            self.random.shuffle(free)
        self.tables = np.zeros((len(needed), max(needed)), np.int32)
        for i, count in enumerate(needed):
            self.tables[i, :count], free = free[:count], free[count:]
        self.backend = SdpaBackend()
        spec = KVCacheSpec(
            num_kv_heads=case.kv_heads,
            head_size=case.head_size,
            dtype=dtype,
            v_head_size=None if case.v_head_size == case.head_size else case.v_head_size,
        )
        self.backend.allocate([spec, spec], self.num_blocks, size, self.device)
        for cache in (*self.backend._keys, *self.backend._values):
            cache[: self.num_blocks * size] = math.nan
        self.queries = self.random_tensors(case.kv_heads * case.groups, case.head_size, dtype)
        self.keys = self.random_tensors(case.kv_heads, case.head_size, dtype)
        self.values = self.random_tensors(case.kv_heads, case.v_head_size, dtype)

    def random_tensors(self, heads, size, dtype):
        return [torch.randn(length, heads, size).to(dtype) for length in self.case.lengths]

    def metadata(self, parts):
        """``parts``: sequence, first new position, end position."""
        size = self.case.block_size
        slots = [self.tables[i, p // size] * size + p % size for i, begin, end in parts for p in range(begin, end)]
        counts = [end - begin for _, begin, end in parts]
        metadata = AttentionMetadata(
            num_tokens=sum(counts),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            seq_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=self.tables[[i for i, *_ in parts]],
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
            block_size=size,
        )
        metadata.plan = self.backend.plan(metadata)
        return metadata

    def step(self, parts, layer=1):
        """Run the parts in one packed step; return each one's output and what it should be."""
        case, scale = self.case, self.case.head_size**-0.5

        def pack(tensors):
            return torch.cat([tensors[i][begin:end] for i, begin, end in parts]).to(self.device)

        output = self.backend.forward(
            layer, pack(self.queries), pack(self.keys), pack(self.values), self.metadata(parts),
            scale=scale, sliding_window=case.window, softcap=case.softcap,
        )  # fmt: skip
        outputs = output.cpu().double().split([end - begin for _, begin, end in parts])
        wanted = [
            dense(self.queries[i][begin:end], self.keys[i][:end], self.values[i][:end],
                  scale=scale, window=case.window, softcap=case.softcap)
            for i, begin, end in parts
        ]  # fmt: skip
        return list(zip(outputs, wanted, strict=True))

    def steps(self):
        """Every sequence's chunks in order, sequences dropping in and out of the packed step at random."""
        left = [list(chunks) for chunks in self.case.chunks]
        done = [0] * len(left)
        while any(left):
            waiting = [i for i, chunks in enumerate(left) if chunks]
            chosen = self.random.permutation(waiting)[: self.random.integers(1, len(waiting) + 1)]
            parts = []
            for i in map(int, chosen):
                count = left[i].pop(0)
                parts.append((i, done[i], done[i] + count))
                done[i] += count
            yield parts


def check(harness, dtype=torch.float32):
    for parts in harness.steps():
        for got, wanted in harness.step(parts):
            assert got.shape == wanted.shape
            torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[dtype])


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
    (spec,) = folo_attention_backends()
    assert spec.name == "sdpa"
    assert isinstance(spec.factory(None), AttentionBackend)
    assert spec.supports("cpu", "float32") is None
    assert spec.supports("cuda:1", "bfloat16") is None
    assert "tpu" in spec.supports("tpu", "float32")
    assert "int8" in spec.supports("cpu", "int8")
