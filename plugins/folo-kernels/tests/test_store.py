"""Attention over blocks equals dense float64 attention, whatever lies in slots that belong to nobody."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_kernels import library as native
from folo_kernels.store import TILE_ROWS, BlockStore, LayerShape, PackedStep, tiles

pytestmark = pytest.mark.usefixtures("library")


def dense(query, key, value, *, scale, window=None, softcap=None):  # noqa: PLR0913 (what attention depends on)
    """Causal attention of one sequence's last tokens, in float64."""
    query, (key, value) = (
        query.double(),
        (each.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value)),
    )
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n, m = query.shape[0], key.shape[0]
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    hidden = (distance < 0) | (distance >= (window or m + 1))
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@attrs.frozen
class Case:
    block_size: int
    kv_heads: int
    group: int
    key_size: int
    value_size: int
    chunks: list[list[int]]  # of each sequence: tokens of its steps
    window: int | None = None
    softcap: float | None = None
    seed: int = 0


@st.composite
def cases(draw):
    size = draw(st.sampled_from([4, 17, 64, 80, 128]))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 4, 16, 256])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7])),
        key_size=size,
        value_size=draw(st.sampled_from([size, size, 6, 33])),
        chunks=draw(
            st.lists(
                st.lists(st.sampled_from([1, 1, 1, 2, 5, 17, 49, 130, 300]), min_size=1, max_size=4),
                min_size=1,
                max_size=6,
            )
        ),
        window=draw(st.sampled_from([None, None, 1, 3, 16, 100, 200])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        seed=draw(st.integers(0, 2**31)),
    )


class Harness:
    """Two layers of scattered blocks, in which all but the sequences' own slots hold NaN."""

    def __init__(self, case):
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        lengths = [sum(chunks) for chunks in case.chunks]
        needed = [-(-length // case.block_size) for length in lengths]
        free = (torch.randperm(sum(needed), generator=random) + 1).tolist()
        self.tables = np.zeros((len(needed), max(needed) + 1), np.int32)
        for table, count in zip(self.tables, needed, strict=True):
            table[:count], free = free[:count], free[count:]
        shape = LayerShape(kv_heads=case.kv_heads, key_size=case.key_size, value_size=case.value_size)
        self.store = BlockStore([shape, shape], sum(needed) + 2, case.block_size)
        for tensor in self.store.tensors():
            tensor.fill_(torch.nan)
        heads = case.kv_heads * case.group

        def made(heads, size):
            return [torch.randn(length, heads, size, generator=random) for length in lengths]

        self.queries, self.keys = made(heads, case.key_size), made(case.kv_heads, case.key_size)
        self.values = made(case.kv_heads, case.value_size)
        self.done = [0] * len(lengths)

    def step(self, chosen):
        """The next tokens of some sequences, ``(sequence, count)``, in one packed step: each one's rows."""
        parts = [(i, self.done[i], self.done[i] + count) for i, count in chosen]
        size = self.case.block_size
        slots = [int(self.tables[i, p // size]) * size + p % size for i, begin, end in parts for p in range(begin, end)]
        counts = [end - begin for _, begin, end in parts]
        step = PackedStep(
            np.cumsum([0, *counts]).astype(np.int32),
            np.array([end for *_, end in parts], np.int32),
            self.tables[[i for i, *_ in parts]],
            torch.tensor(slots),
            self.case.group,
        )
        query, key, value = (
            torch.cat([tensors[i][begin:end] for i, begin, end in parts])
            for tensors in (self.queries, self.keys, self.values)
        )
        self.store.write(1, step, key, value)
        options = {"scale": self.case.key_size**-0.5, "window": self.case.window, "softcap": self.case.softcap}
        found = self.store.attend(1, step, query, **options).split(counts)
        for i, _, end in parts:
            self.done[i] = end
        wanted = [
            dense(self.queries[i][begin:end], self.keys[i][:end], self.values[i][:end], **options)
            for i, begin, end in parts
        ]
        return list(zip(found, wanted, strict=True))

    def steps(self):
        random = np.random.default_rng(self.case.seed)
        left = [list(chunks) for chunks in self.case.chunks]
        while any(left):
            waiting = [i for i, chunks in enumerate(left) if chunks]
            chosen = random.permutation(waiting)[: random.integers(1, len(waiting) + 1)]
            yield [(int(i), left[i].pop(0)) for i in chosen]


def check(case):
    harness = Harness(case)
    for chosen in harness.steps():
        for found, wanted in harness.step(chosen):
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    return harness


@settings(max_examples=50, deadline=None)
@given(cases())
def test_equals_dense_attention_amid_nan(case):
    harness = check(case)
    assert harness.store.keys[0].isnan().all(), "the other layer is left alone"
    assert all(tensor[0].isnan().all() for tensor in harness.store.tensors()), "block 0 belongs to nobody"


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0), (150, 2.0)])
def test_long_contexts_in_chunks(block_size, window, softcap):
    chunks = [[700, 1, 1], [200, 300, 1], [1, 128, 127, 1, 1], [129]]
    check(Case(block_size, 2, 3, 64, 64, chunks, window, softcap))


def test_more_heads_in_a_group_than_a_tile_has_rows():
    check(Case(16, 1, TILE_ROWS + 3, 8, 8, [[9, 1], [1]]))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 60))
def test_tiles_cover_every_token_once(counts, most):
    starts = np.cumsum([0, *counts]).astype(np.int32)
    found = tiles(starts, most)
    assert found.dtype == np.int32
    covered = sorted((int(sequence), token) for sequence, first, end in found for token in range(first, end))
    assert covered == [(i, token) for i, count in enumerate(counts) for token in range(starts[i], starts[i] + count)]
    assert all(1 <= end - first <= most for _, first, end in found)


def test_the_threads_and_neighbours_change_no_bit(library):
    case = Case(16, 2, 3, 64, 64, [[300, 1], [77, 1], [1, 1], [140, 1]])
    found = []
    try:
        for threads, together in [(1, True), (2, True), (2, False)]:
            native.use_threads(library, threads)
            harness = Harness(case)
            for turn in range(2):
                chosen = [(i, chunks[turn]) for i, chunks in enumerate(case.chunks)]
                steps = [chosen] if together else [[each] for each in chosen]
                found.append(torch.cat([rows for step in steps for rows, _ in harness.step(step)]))
    finally:
        native.use_threads(library, 2)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[5])


def test_a_nan_in_one_sequence_stays_there():
    case = Case(4, 2, 2, 8, 8, [[6, 1], [6, 1]])
    harness = Harness(case)
    harness.keys[0][3] = torch.nan
    for chosen in ([(0, 6), (1, 6)], [(0, 1), (1, 1)]):
        (poisoned, _), (found, wanted) = harness.step(chosen)
        assert poisoned[-1].isnan().all()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def weights_of(scores, *, softcap=None, block_size=16):
    """Softmax of one row of scores, as attention computes it: keys are the scores, values are units."""
    count = len(scores)
    store = BlockStore([LayerShape(kv_heads=1, key_size=1, value_size=count)], -(-count // block_size) + 1, block_size)
    table = np.arange(1, -(-count // block_size) + 1, dtype=np.int32)[None]
    everything = torch.arange(count) + block_size
    fill = PackedStep(np.array([0, count]), np.array([count]), table, everything, 1)
    store.write(0, fill, scores.view(count, 1, 1), torch.eye(count).view(count, 1, count))
    last = PackedStep(np.array([0, 1]), np.array([count]), table, everything[-1:], 1)
    return store.attend(0, last, torch.ones(1, 1, 1), scale=1.0, softcap=softcap)[0, 0]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 3e38, -3e38])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 87.0, 1e3])
def test_weights_hold_for_scores_of_any_size(shift, spread):
    scores = torch.linspace(0, -spread, 300)[torch.randperm(300)] + shift
    found, wanted = weights_of(scores).double(), scores.double().softmax(0)
    torch.testing.assert_close(found, wanted, rtol=3e-6, atol=2e-38)
    assert abs(found.sum() - 1) < 1e-5


def test_scores_of_minus_infinity_weigh_nothing():
    scores = torch.randn(200)
    scores[:130] = -torch.inf
    scores[150] = -torch.inf
    found = weights_of(scores)
    torch.testing.assert_close(found, scores.softmax(0), rtol=3e-6, atol=1e-9)
    assert (found[scores.isinf()] == 0).all()


@pytest.mark.parametrize("scores", [[0.0, torch.inf], [0.0, torch.nan], [-torch.inf, -torch.inf]])
def test_weights_that_are_no_numbers_are_none_in_torch_either(scores):
    scores = torch.tensor(scores)
    assert scores.softmax(0).isnan().any()
    assert weights_of(scores).isnan().any()


@pytest.mark.parametrize("softcap", [0.5, 5.0, 30.0])
def test_caps_hold_far_out_and_near_zero(softcap):
    scores = torch.cat([torch.linspace(-50, 50, 201), torch.tensor([0.0, 1e-20, -1e-20, 1e-4, 1e6, -1e6, 3e38, -3e38])])
    wanted = (torch.tanh(scores.double() / softcap) * softcap).softmax(0)
    torch.testing.assert_close(weights_of(scores, softcap=softcap).double(), wanted, rtol=1e-5, atol=1e-30)
