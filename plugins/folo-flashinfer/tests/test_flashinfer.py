"""The flashinfer backend equals dense attention: through a stand-in here, through FlashInfer itself on a GPU."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import attrs
import numpy as np
import pytest
import standin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_core.attention.interface import AttentionBackend, AttentionMetadata, KVCacheSpec, SwappingBackend
from folo_core.errors import ConfigError
from folo_flashinfer import backend as module
from folo_flashinfer.backend import FlashInferBackend, load_library
from folo_flashinfer.pages import split
from folo_flashinfer.plugin import folo_attention_backends
from folo_flashinfer.storage import runs


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch, request):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 64)


@attrs.frozen
class Case:
    chunks: list[list[int]]
    block_size: int = 4
    kv_heads: int = 2
    groups: int = 2
    size: int = 64
    window: int | None = None
    softcap: float | None = None
    seed: int = 0


class Harness:
    """Sequences with random keys and values over scattered blocks; slots that nobody wrote hold ``stale``."""

    def __init__(self, case, library=standin, device="cpu", dtype=torch.float32, stale=math.nan):
        self.case, self.device = case, torch.device(device)
        self.random = np.random.default_rng(case.seed)
        torch.manual_seed(case.seed)
        lengths = [sum(chunks) for chunks in case.chunks]
        needed = [-(-length // case.block_size) for length in lengths]
        free = self.random.permutation(np.arange(1, sum(needed) + 1))
        self.tables = np.zeros((len(needed), max(needed) + 1), np.int32)
        for i, count in enumerate(needed):
            self.tables[i, :count], free = free[:count], free[count:]
        spec = KVCacheSpec(num_kv_heads=case.kv_heads, head_size=case.size, dtype=dtype)
        self.backend = FlashInferBackend(library)
        self.backend.allocate([spec, spec], sum(needed) + 1, case.block_size, self.device)
        for cache in self.backend.pool.tensors():
            cache.fill_(stale)
        shapes = [(length, heads, case.size) for heads in self.heads for length in lengths]
        drawn = [torch.randn(shape).to(dtype) for shape in shapes]
        count = len(lengths)
        self.queries, self.keys, self.values = drawn[:count], drawn[count : 2 * count], drawn[2 * count :]

    @property
    def heads(self):
        return self.case.kv_heads * self.case.groups, self.case.kv_heads, self.case.kv_heads

    def metadata(self, parts):
        """``parts``: sequence, first new position, end position."""
        size = self.case.block_size
        slots = [self.tables[i, p // size] * size + p % size for i, begin, end in parts for p in range(begin, end)]
        metadata = AttentionMetadata(
            num_tokens=len(slots),
            query_start=np.cumsum([0, *(end - begin for _, begin, end in parts)]).astype(np.int32),
            seq_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=self.tables[[i for i, *_ in parts]],
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
            block_size=size,
        )
        metadata.plan = self.backend.plan(metadata)
        return metadata

    def run(self, parts, metadata=None, layer=1, **options):
        def pack(tensors):
            return torch.cat([tensors[i][begin:end] for i, begin, end in parts]).to(self.device)

        asked = {"scale": self.case.size**-0.5, "sliding_window": self.case.window, "softcap": self.case.softcap}
        return self.backend.forward(
            layer, pack(self.queries), pack(self.keys), pack(self.values), metadata or self.metadata(parts),
            **(asked | options),
        )  # fmt: skip

    def wanted(self, parts):
        case = self.case
        return torch.cat([
            standin.dense(
                self.queries[i][begin:end], self.keys[i][:end], self.values[i][:end],
                scale=case.size**-0.5, window=case.window, softcap=case.softcap,
            )
            for i, begin, end in parts
        ])  # fmt: skip

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

    def check(self, tolerance):
        for parts in self.steps():
            got = self.run(parts).cpu().double()
            torch.testing.assert_close(got, self.wanted(parts), rtol=0, atol=tolerance)


MIXED = Case([[30, 1, 1, 7], [1, 1, 1], [5, 1, 20, 1], [17]], seed=3)

cases = st.builds(
    Case,
    chunks=st.lists(st.lists(st.sampled_from([1, 1, 2, 5, 17]), min_size=1, max_size=4), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, 16]),
    kv_heads=st.integers(1, 2),
    groups=st.sampled_from([1, 3, 4]),
    window=st.sampled_from([None, None, 1, 3, 16]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**31),
)


# --- through the stand-in -------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(cases)
def test_equals_dense_attention_amid_nan(case):
    """Slots that no token was written to hold NaN, so equality also proves that none of their pages is named."""
    Harness(case).check(2e-5)


def test_pages_are_laid_out_end_to_end():
    harness = Harness(Case([[9], [6], [4], [5]], block_size=4))
    decoding, reading = split(harness.metadata([(0, 8, 9), (1, 0, 6), (2, 3, 4), (3, 2, 5)]))
    assert decoding.rows.tolist() == [0, 7]
    assert decoding.page_start.tolist() == [0, 3, 4]
    assert decoding.page_ids.tolist() == [*harness.tables[0, :3], harness.tables[2, 0]]
    assert decoding.last_page_len.tolist() == [1, 4]
    assert reading.rows.tolist() == [*range(1, 7), 8, 9, 10]
    assert reading.query_start.tolist() == [0, 6, 9]
    assert reading.page_start.tolist() == [0, 2, 4]
    assert reading.last_page_len.tolist() == [2, 1]


def test_a_step_of_one_sort_gathers_no_rows():
    harness = Harness(Case([[3], [2]]))
    assert split(harness.metadata([(0, 2, 3), (1, 1, 2)]))[0].rows is None
    decoding, reading = split(harness.metadata([(0, 0, 3), (1, 0, 2)]))
    assert decoding is None
    assert reading.rows is None


def test_layers_that_attend_alike_share_a_plan_and_others_do_not():
    harness = Harness(MIXED)
    parts = [(0, 0, 30), (1, 0, 1)]
    metadata = harness.metadata(parts)
    for layer in (0, 1):
        harness.run(parts, metadata, layer=layer)
    assert sorted(which for _, which in harness.backend._wrappers) == ["decode", "prefill"]
    assert {wrapper.plans for wrapper in harness.backend._wrappers.values()} == {1}
    harness.run(parts, metadata, sliding_window=3)
    assert len(harness.backend._wrappers) == 4
    harness.run(parts)
    assert sorted(wrapper.plans for wrapper in harness.backend._wrappers.values()) == [1, 1, 2, 2]


def test_a_window_counts_the_token_itself_where_flashinfer_does_not():
    harness = Harness(attrs.evolve(MIXED, window=3))
    harness.run([(0, 0, 30)])
    (wrapper,) = harness.backend._wrappers.values()
    assert wrapper.planned["window_left"] == 2


@pytest.mark.parametrize(("groups", "expected"), [(2, False), (4, True)])
def test_decoding_takes_tensor_cores_for_wide_groups(groups, expected):
    harness = Harness(attrs.evolve(MIXED, groups=groups))
    harness.run([(1, 0, 1)])
    (wrapper,) = harness.backend._wrappers.values()
    assert wrapper.options == {"use_tensor_cores": expected}


def test_a_foreign_plan_is_refused_by_name():
    harness = Harness(MIXED)
    metadata = harness.metadata([(0, 0, 30)])
    metadata.plan = None
    with pytest.raises(TypeError, match=r"metadata\.plan: NoneType"):
        harness.run([(0, 0, 30)], metadata)


# --- blocks ---------------------------------------------------------------------------------------------------------


def filled(device="cpu", blocks=8):
    backend = FlashInferBackend(standin)
    spec = KVCacheSpec(num_kv_heads=2, head_size=64, dtype=torch.float32)
    backend.allocate([spec, spec], blocks, 4, torch.device(device))
    for cache in backend.pool.tensors():
        cache.normal_()
    return backend


def contents(backend):
    return [cache.clone() for cache in backend.pool.tensors()]


def test_copies_read_all_sources_before_they_write():
    backend = filled()
    before = contents(backend)
    backend.copy_blocks([1, 2], [2, 3])
    for old, new in zip(before, contents(backend), strict=True):
        assert torch.equal(new[[2, 3]], old[[1, 2]])
        assert torch.equal(new[[0, 1, 4, 5, 6, 7]], old[[0, 1, 4, 5, 6, 7]])


def test_zeroed_blocks_lose_even_nan_and_others_stay():
    backend = filled()
    backend.pool.keys[0][3] = math.nan
    before = contents(backend)
    backend.zero_blocks([3, 5])
    for old, new in zip(before, contents(backend), strict=True):
        assert not new[[3, 5]].any()
        assert torch.equal(new[[1, 2, 4, 6]], old[[1, 2, 4, 6]])


@given(st.data())
def test_blocks_come_back_from_the_host_wherever_they_are_put(data):
    backend = filled()
    backend.allocate_host(9)
    count = data.draw(st.integers(1, 7))
    sources, targets = (data.draw(st.permutations(range(1, 8)))[:count] for _ in range(2))
    hosts = data.draw(st.permutations(range(1, 10)))[:count]
    before = contents(backend)
    backend.swap_out(sources, hosts)
    backend.zero_blocks(list(range(8)))
    backend.swap_in(hosts, targets)
    for old, new in zip(before, contents(backend), strict=True):
        assert torch.equal(new[targets], old[sources])


def test_runs_of_neighbours_are_copied_together():
    assert list(runs([3, 4, 5, 9, 8, 9])) == [(0, 3), (3, 4), (4, 6)]


# --- what is offered and refused ------------------------------------------------------------------------------------


def test_it_is_a_backend_that_can_swap_and_is_not_recorded():
    backend = FlashInferBackend(standin)
    assert isinstance(backend, AttentionBackend)
    assert isinstance(backend, SwappingBackend)
    assert not backend.supports_graphs


def test_the_plugin_offers_it_below_all_that_auto_could_take():
    (spec,) = folo_attention_backends()
    assert (spec.name, spec.priority < 0) == ("flashinfer", True)


def test_it_is_refused_with_the_reason(monkeypatch):
    (spec,) = folo_attention_backends()
    assert "not on cpu" in spec.supports("cpu", "bfloat16")
    assert "not float32" in spec.supports("cuda:0", "float32")
    monkeypatch.setattr("folo_flashinfer.plugin.find_spec", lambda name: None)
    assert "is not installed: python -m pip install" in spec.supports("cuda:0", "bfloat16")
    monkeypatch.setattr("folo_flashinfer.plugin.find_spec", lambda name: "there")
    assert spec.supports("cuda:0", "float16") is None


def test_a_library_that_fails_to_import_is_refused_with_what_it_said(monkeypatch, tmp_path):
    (tmp_path / "flashinfer.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported \(OSError: libcudart\.so.*pip install"):
        load_library()


def test_the_factory_takes_the_library_that_is_installed(monkeypatch):
    (spec,) = folo_attention_backends()
    library = ModuleType("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    assert spec.factory(None)._library is library


@pytest.mark.parametrize(("size", "v_size"), [(80, None), (128, 64)])
def test_heads_without_kernels_are_refused(size, v_size):
    spec = KVCacheSpec(num_kv_heads=1, head_size=size, v_head_size=v_size, dtype=torch.float32)
    with pytest.raises(ConfigError, match=rf"heads have .*{size}.*leave attention 'auto'"):
        FlashInferBackend(standin).allocate([spec], 4, 4, torch.device("cpu"))


# --- FlashInfer itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flashinfer():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (nox -s gpu)")
    return pytest.importorskip("flashinfer")


TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 4, "size": 128, "block_size": 16},
        {"window": 5},
        {"softcap": 5.0},
        {"window": 9, "softcap": 5.0, "groups": 8},
        {"chunks": [[700, 1, 1, 300], [1, 1], [513, 1, 64]], "size": 128, "block_size": 16, "groups": 2},
    ],
    ids=str,
)
def test_flashinfer_equals_dense_attention(flashinfer, dtype, changes):
    case = attrs.evolve(MIXED, **changes)
    Harness(case, flashinfer, "cuda", dtype, stale=30.0).check(TOLERANCE[dtype])


@pytest.mark.gpu
def test_flashinfer_lets_no_stale_nan_through(flashinfer):
    Harness(attrs.evolve(MIXED, block_size=16), flashinfer, "cuda", torch.bfloat16).check(TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_blocks_swap_through_pinned_memory(flashinfer):
    backend = filled("cuda")
    backend.allocate_host(5)
    before = contents(backend)
    backend.swap_out([1, 2, 7], [4, 5, 1])
    backend.zero_blocks(list(range(8)))
    backend.swap_in([4, 5, 1], [3, 6, 2])
    for old, new in zip(before, contents(backend), strict=True):
        assert torch.equal(new[[3, 6, 2]], old[[1, 2, 7]])
