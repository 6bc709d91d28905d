"""Attention over blocks on a device equals dense float64 attention, whatever lies in slots that belong to nobody.

On a machine without CUDA the kernels run in Triton's interpreter; with CUDA the same tests run compiled, and larger.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_kernels.gpu import interpreter
from folo_kernels.gpu.blocks import DeviceBlocks, LayerShape
from folo_kernels.gpu.plan import Tuning

HAS_CUDA = torch.cuda.is_available()
REASON = "with CUDA kernels are compiled" if HAS_CUDA else interpreter.enable()
if not HAS_CUDA and REASON:
    pytest.skip(REASON, allow_module_level=True)

from folo_kernels.gpu import attention_kernels as kernels  # noqa: E402
from folo_kernels.gpu import layers  # noqa: E402
from folo_kernels.gpu.attention import (  # noqa: E402 (Triton reads how to run kernels when it is imported)
    Configs,
    DecodeConfig,
    PagedAttention,
    PrefillConfig,
    Scoring,
    configs_for,
    store_kv,
)

interpreted = pytest.mark.skipif(REASON is not None, reason=str(REASON))
compiled = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def dense(query, key, value, *, scale, window=None, softcap=None):  # noqa: PLR0913 (what attention depends on)
    """Causal attention of one sequence's last tokens, in float64."""
    query = query.double()
    key, value = (each.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n, m = query.shape[0], key.shape[0]
    distance = torch.arange(m - n, m, device=query.device)[:, None] - torch.arange(m, device=query.device)
    hidden = (distance < 0) | (distance >= (window or m + 1))
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@attrs.frozen(kw_only=True)
class Case:
    sequences: list[tuple[int, int]]
    """New tokens and tokens that came before; (1, -1) is a padding row."""
    shared: list[int] = attrs.field(factory=list)
    """For each sequence, how many blocks it has in common with the one before; as many as both fill, at most."""
    kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    value_size: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    min_split: int = 32
    extra: int = 8
    """Items beyond one for each row, about."""
    captured: bool = False
    seed: int = 0
    scales: tuple[float, float] | None = None
    """Of keys and values in float8; None for those in the queries' dtype."""


class Run:
    """A case's blocks, in which all slots but the sequences' own hold NaN, and its queries."""

    def __init__(self, case, dtype=torch.float32, device="cpu", configs=None):
        self.case, self.random = case, np.random.default_rng(case.seed)
        torch.manual_seed(case.seed)
        self.device, self.dtype = torch.device(device), dtype
        self.lens = np.array([new + past for new, past in case.sequences], np.int32)
        self.query_start = np.cumsum([0, *(new for new, _ in case.sequences)]).astype(np.int32)
        self.tables = self.block_tables()
        key_scale, value_scale = case.scales or (1.0, 1.0)
        shape = LayerShape(
            kv_heads=case.kv_heads, key_size=case.head_size, value_size=case.value_size,
            dtype=torch.float8_e4m3fn if case.scales else dtype, key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip
        self.blocks = DeviceBlocks([shape, shape], int(self.tables.max()) + 2, case.block_size, self.device)
        for cache in self.blocks.tensors():
            cache.fill_(math.nan)
        slots = torch.from_numpy(np.unique(np.concatenate([self.slots(i) for i in range(len(self.lens))])))
        for cache, scale in ((self.blocks.keys[1], key_scale), (self.blocks.values[1], value_scale)):
            new = (torch.randn(len(slots), case.kv_heads, cache.shape[3]) / scale).to(self.device, cache.dtype)
            indexed(cache)[slots // case.block_size, :, slots % case.block_size] = indexed(new)
        heads = case.kv_heads * case.group
        self.query = torch.randn(int(self.query_start[-1]), heads, case.head_size).to(self.device, dtype)
        processors = max(1, -(-case.extra * case.kv_heads // 4))
        configs = configs or Configs(
            decode=DecodeConfig(block_n=32, shared_rows=16, shared_block_n=16, num_warps=4, num_stages=3),
            prefill=PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=3),
        )
        tuning = Tuning(
            kv_heads=case.kv_heads, group=1, min_split=case.min_split, few_split=case.min_split, processors=processors,
            few_programs=4, waves=1,
            min_shared=2 * case.block_size, shared_rows=configs.decode.shared_rows, query_rows=configs.prefill.block_m,
        )  # fmt: skip
        width = self.tables.shape[1]
        self.attention = PagedAttention(
            self.blocks, max_rows=len(self.lens), max_width=width, tuning=tuning, configs=configs
        )

    def block_tables(self):
        size = self.case.block_size
        needed = [-(-int(length) // size) for length in self.lens]
        free = iter((self.random.permutation(sum(needed)) + 1).tolist())
        tables = np.zeros((len(needed), max([1, *needed]) + 1), np.int32)
        for i, count in enumerate(needed):
            tables[i, :count] = [next(free) for _ in range(count)]
            wanted = self.case.shared[i] if i and i < len(self.case.shared) else 0
            common = min(wanted, *(int(self.before(j)) // size for j in (i - 1, i))) if i else 0
            tables[i, : max(0, common)] = tables[i - 1, : max(0, common)]
        return tables

    def before(self, i):
        return self.case.sequences[i][1]

    def slots(self, i):
        positions = np.arange(max(0, self.lens[i]))
        size = self.case.block_size
        return self.tables[i, positions // size].astype(np.int64) * size + positions % size

    def scoring(self):
        shape = self.blocks.shapes[1]
        scales = {"k_scale": shape.key_scale, "v_scale": shape.value_scale}
        return Scoring(scale=self.case.head_size**-0.5, window=self.case.window, softcap=self.case.softcap, **scales)

    def attend(self, query=None, out=None):
        case = self.case
        plan = self.attention.plan(self.query_start, self.lens, self.tables, is_captured=case.captured)
        if out is None:
            out = torch.full((len(self.query), self.query.shape[1], case.value_size), math.nan).to(self.query)
        return plan, self.attention.attend(1, self.query if query is None else query, plan, self.scoring(), out)

    def wanted(self):
        case, outputs = self.case, []
        for i, (new, _) in enumerate(case.sequences):
            slots = torch.from_numpy(self.slots(i)).to(self.device)
            key, value = (
                indexed(cache)[slots // case.block_size, :, slots % case.block_size].view(cache.dtype).float() * scale
                for cache, scale in zip(
                    (self.blocks.keys[1], self.blocks.values[1]), case.scales or (1.0, 1.0), strict=True
                )
            )
            query = self.query[self.query_start[i] : self.query_start[i + 1]]
            if len(slots):
                scale = case.head_size**-0.5
                outputs.append(dense(query, key, value, scale=scale, window=case.window, softcap=case.softcap))
            else:
                outputs.append(torch.zeros(new, *self.query.shape[1:2], case.value_size).to(query).double())
        return torch.cat(outputs)

    def check(self, atol=None):
        plan, got = self.attend()
        atol = atol or (2e-5 if self.dtype == torch.float32 and got.is_cuda else TOLERANCE[self.dtype])
        torch.testing.assert_close(got.double(), self.wanted(), rtol=0, atol=atol)
        assert not self.attention._counters[-1].any(), "the next layer counts from zero"
        return plan


def indexed(tensor):
    """Float8 as bytes, which torch moves by index."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@st.composite
def cases(draw, most=90):
    captured = draw(st.booleans())
    decode = st.tuples(st.just(1), st.integers(0, most))
    kinds = (
        [decode, decode, st.just((1, -1))]
        if captured
        else [decode, st.tuples(st.integers(2, 40), st.integers(0, most))]
    )
    sequences = draw(st.lists(st.one_of(kinds), min_size=1, max_size=6))
    head_size = draw(st.sampled_from([64, 64, 80, 96, 128, 256]))
    return Case(
        sequences=sequences,
        shared=draw(st.lists(st.sampled_from([0, 3, 100]), min_size=len(sequences), max_size=len(sequences))),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        head_size=head_size,
        value_size=draw(st.sampled_from([head_size, head_size, 48])),
        block_size=draw(st.sampled_from([4, 16])),
        window=draw(st.sampled_from([None, None, 1, 20])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        min_split=draw(st.sampled_from([32, 64, 1000])),
        extra=draw(st.sampled_from([1, 4, 30])),
        captured=captured,
        seed=draw(st.integers(0, 2**31)),
    )


@interpreted
@settings(max_examples=12)
@given(cases())
def test_equals_dense_attention_amid_nan(case):
    """All slots but the sequences' own hold NaN, as does the output before, so none is read and all is written."""
    Run(case).check()


# Compiling takes seconds, so what kernels are compiled for comes from a short list, and only what they read is drawn.
COMPILED = [
    ({"kv_heads": 8, "group": 2, "head_size": 128, "value_size": 128}, torch.bfloat16),
    ({"kv_heads": 2, "group": 4, "head_size": 128, "value_size": 128, "window": 48}, torch.bfloat16),
    ({"kv_heads": 2, "group": 8, "head_size": 256, "value_size": 256, "softcap": 5.0}, torch.bfloat16),
    ({"kv_heads": 3, "group": 3, "head_size": 80, "value_size": 80, "window": 48}, torch.float16),
    ({"kv_heads": 1, "group": 1, "head_size": 192, "value_size": 128, "block_size": 32}, torch.bfloat16),
    ({"kv_heads": 2, "group": 2, "head_size": 64, "value_size": 64, "block_size": 16}, torch.float32),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("shape", "dtype"), COMPILED)
@settings(max_examples=40)
@given(case=cases(most=700))
def test_compiled_kernels_equal_dense_attention_amid_nan(shape, dtype, case):
    case = attrs.evolve(case, **({"block_size": 16, "window": None, "softcap": None} | shape))
    configs = configs_for(torch.cuda.get_device_capability(), max(case.head_size, case.value_size), dtype)
    Run(case, dtype, "cuda", configs).check()


DEVICES = [
    pytest.param("cpu", torch.float32, 1, marks=interpreted),
    pytest.param("cuda", torch.bfloat16, 24, marks=compiled),
    pytest.param("cuda", torch.float16, 24, marks=compiled),
]
on_devices = pytest.mark.parametrize(("device", "dtype", "times"), DEVICES)


@on_devices
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_rows_that_share_a_prefix_read_it_together(device, dtype, times, group):
    length = 48 * times
    rows = [(1, length + extra) for extra in (1, 20, 0, 33, 7)]
    case = Case(sequences=rows, shared=[0, *[100 * times] * 4], group=group, extra=20)
    plan = Run(case, dtype, device).check()
    items = plan.work.items
    within = items[items[:, 2] < length // 16 * 16]
    chunks = -(-len(rows) // (16 // group))
    assert (within[:, 3] - within[:, 2]).sum() == chunks * (length // 16 * 16)
    assert within[:, 1].max() == -(-len(rows) // chunks)


@on_devices
def test_a_window_hides_most_of_a_shared_prefix(device, dtype, times):
    rows = [(1, 64 * times + extra) for extra in (1, 20, 5)]
    case = Case(sequences=rows, shared=[0, 100 * times, 100 * times], window=30, extra=20)
    assert Run(case, dtype, device).check().work.has_shared


@on_devices
def test_a_captured_step_launches_the_same_whatever_its_rows_hold(device, dtype, times):
    launches = set()
    for past in (0, 40 * times, 90 * times):
        case = Case(sequences=[(1, past), (1, past // 2), (1, -1)], shared=[0, 2, 0], captured=True)
        plan = Run(case, dtype, device).check()
        launches.add((plan.item_programs, plan.has_shared, plan.num_slots))
        assert len(plan.work.items) <= plan.item_programs
    assert len(launches) == 1


FLOAT8 = {
    "plain": {},
    "windows": {"window": 30},
    "caps": {"softcap": 5.0},
    "wide": {"head_size": 128, "value_size": 128, "group": 4},
    "odd": {"head_size": 80, "value_size": 48, "block_size": 4},
}


@on_devices
@pytest.mark.parametrize("name", FLOAT8)
def test_keys_and_values_in_float8(device, dtype, times, name):
    """Rows that share a prefix, rows of one item and of several, and prompts."""
    rows = [(1, 80 * times), (1, 80 * times + 9), (1, 3), (19, 40 * times)]
    case = Case(sequences=rows, shared=[0, 100 * times, 0, 0], scales=(0.25, 8.0), extra=20, **FLOAT8[name])
    if device == "cpu":
        assert Run(case, dtype, device).check(atol=2e-5).work.has_shared
        return
    configs = configs_for(torch.cuda.get_device_capability(), case.head_size, torch.float8_e4m3fn)
    Run(case, dtype, device, configs).check(atol=2 * TOLERANCE[dtype])


@on_devices
def test_rows_are_merged_by_whoever_ends_last_and_again_in_the_next_layer(device, dtype, times):
    """Each row's partial results and those of what it shares are counted together, and the counters begin at zero."""
    rows = [(1, 64 * times + extra) for extra in (70, 90, 0, 300)]
    case = Case(sequences=[*rows, (1, -1), (1, 40)], shared=[0, *[100 * times] * 3], extra=30, captured=True)
    run = Run(case, dtype, device)
    for _ in range(3):
        plan = run.check()
        run.query = torch.randn_like(run.query)
    merged = plan.work.rows[plan.work.rows[:, 3] >= 0]
    assert (merged[:4, 3] > 0).all()
    assert (merged[:4, 6] > 0).all()
    assert plan.work.rows[4, 3] == -1


@on_devices
def test_rows_that_own_nothing_are_merged_by_their_chunk(device, dtype, times):
    case = Case(sequences=[(1, 64 * times - 1)] * 3, shared=[0, 100 * times, 100 * times], extra=30)
    run = Run(case, dtype, device)
    run.tables[1:] = run.tables[0]
    rows = run.check().work.rows
    assert (rows[:, 3] == 0).all()
    assert (rows[:, 6] > 1).all()


@on_devices
def test_steps_of_other_rows_count_apart(device, dtype, times):
    """A larger step than there was room for, and then a smaller one."""
    run = Run(Case(sequences=[(1, 70 * times)], extra=30), dtype, device)
    large = Run(Case(sequences=[(1, 70 * times), (1, 40)], extra=30), dtype, device)
    large.attention, large.blocks = run.attention, run.blocks
    large.tables[:] = run.tables[0]
    for each in (run, large, run):
        each.check()
    assert [len(counters) for counters in run.attention._counters] == [2, 4]


@on_devices
def test_strided_queries_and_outputs_are_taken_as_they_lie(device, dtype, times):
    run = Run(Case(sequences=[(1, 40), (9, 5), (1, 3)]), dtype, device)
    tokens, heads, size = run.query.shape
    packed = torch.full((tokens, heads + 5, size), math.nan).to(run.query)
    packed[:, :heads] = run.query
    out = torch.full((tokens, heads + 2, size), math.nan).to(run.query)
    run.attend(packed[:, :heads], out[:, :heads])
    torch.testing.assert_close(out[:, :heads].double(), run.wanted(), rtol=0, atol=TOLERANCE[dtype])
    assert out[:, heads:].isnan().all()


@on_devices
def test_a_nan_in_one_row_stays_there(device, dtype, times):
    run = Run(Case(sequences=[(1, 50), (1, 60), (1, 55)], shared=[0, 3, 3], extra=20), dtype, device)
    run.query[1, 0] = math.nan
    _, got = run.attend()
    assert got[1, 0].isnan().all()
    keep = [0, 2]
    torch.testing.assert_close(got[keep].double(), run.wanted()[keep], rtol=0, atol=TOLERANCE[dtype])


@on_devices
def test_two_plans_at_once_keep_apart(device, dtype, times):
    run, other = (Run(Case(sequences=[(1, past)], seed=past), dtype, device) for past in (40, 60))
    first = run.attention.plan(run.query_start, run.lens, run.tables)
    run.attention.plan(other.query_start, np.minimum(other.lens, 5), other.tables)
    got = run.attention.attend(1, run.query, first, run.scoring())
    torch.testing.assert_close(got.double(), run.wanted(), rtol=0, atol=TOLERANCE[dtype])


def test_a_captured_step_beyond_the_room_is_refused_with_the_numbers():
    run = Run(Case(sequences=[(1, 40)]), device="cuda" if HAS_CUDA else "cpu")
    lens, tables = np.full(900, 41, np.int32), np.ones((900, 3), np.int32)
    query_start = np.arange(901, dtype=np.int32)
    with pytest.raises(ValueError, match="900 rows and 3 blocks"):
        run.attention.plan(query_start, lens, tables, is_captured=True)
    assert run.attention.plan(query_start, lens, tables).device.numel() > run.attention.stager._memory.numel()


@on_devices
def test_new_keys_and_values_go_to_their_slots_and_nowhere_else(device, dtype, times):
    key, value = torch.randn(5, 3, 80).to(device, dtype), torch.randn(5, 4, 48).to(device, dtype)[:, 1:]
    keys, values = torch.zeros(4, 3, 8, 80).to(key), torch.zeros(4, 3, 8, 48).to(key)
    slots = torch.tensor([9, 0, 31, 17, 16], device=device)
    store_kv(key, value, slots, keys, values)
    for cache, new in ((keys, key), (values, value)):
        wanted = torch.zeros_like(cache)
        wanted[slots // 8, :, slots % 8] = new
        assert torch.equal(cache, wanted)


@on_devices
def test_new_keys_and_values_are_rounded_to_float8(device, dtype, times):
    key, value = torch.randn(5, 3, 80).to(device, dtype), torch.randn(5, 3, 48).to(device, dtype)
    key[0, 0, :2] = torch.tensor([9999.0, -9999.0])
    keys, values = (torch.zeros(4, 3, 8, size, device=device).to(torch.float8_e4m3fn) for size in (80, 48))
    slots = torch.tensor([9, 0, 31, 17, 16], device=device)
    store_kv(key, value, slots, keys, values, key_scale=0.5, value_scale=0.125)
    for cache, new, scale in ((keys, key, 0.5), (values, value, 0.125)):
        wanted = (new.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        found = cache.float()[slots // 8, :, slots % 8]
        assert cache.float().count_nonzero() == found.count_nonzero()
        if device == "cuda":
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        # Triton's interpreter (3.6) cuts off where a device rounds, and loses what is carried into the exponent.
        carried = torch.frexp(wanted).exponent != torch.frexp(new.float() / scale).exponent
        assert (carried | ((found - wanted).abs() <= wanted.abs() / 8 + 2**-8)).all()
        assert carried.float().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_a_nan_is_stored_as_nan_in_float8():
    key = torch.full((1, 1, 16), math.nan, device="cuda", dtype=torch.bfloat16)
    keys = torch.zeros(1, 1, 1, 16, device="cuda").to(torch.float8_e4m3fn)
    store_kv(key, key, torch.zeros(1, dtype=torch.int64, device="cuda"), keys, keys)
    assert keys.float().isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_a_captured_graph_serves_other_steps_of_its_rows():
    lengths = [(700, 30, 5, -1), (3, 1200, 900, 64), (64, 64, 64, 64), (1400, 1300, 1499, 1200)]
    run = Run(Case(sequences=[(1, 1500)] * 4, shared=[0, 50, 0, 50], captured=True), torch.bfloat16, "cuda")
    out = torch.empty_like(run.query)
    plan, _ = run.attend(out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.attention.attend(1, run.query, plan, run.scoring(), out)
    for past in lengths:
        run.lens = np.array(past, np.int32) + 1
        run.attention.plan(run.query_start, run.lens, run.tables, is_captured=True)
        out.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(out.double(), run.wanted(), rtol=0, atol=TOLERANCE[torch.bfloat16])
        assert not run.attention._counters[-1].any()
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first), "parts are added in one order, whichever ends last"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("past", "size"), [(100, 128), (1499, 128), (700, 80)])
def test_steps_that_overlap_read_what_the_one_before_wrote(past, size):
    """Each query, and the last token's key and value, come from kernels that still run when the next is launched."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = Case(sequences=[(1, past)], kv_heads=8, head_size=size, value_size=size, captured=True)
    run = Run(case, torch.bfloat16, "cuda", configs_for((9, 0), size, torch.bfloat16))
    weight = torch.randn(32 * size, 16 * size, device="cuda", dtype=torch.bfloat16) * 0.02  # as large out as in
    tables = [torch.randn(1, size, device="cuda") for _ in range(2)]
    slot, position = torch.tensor(run.slots(0)[-1:], device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    blocks, query = [run.blocks.keys[1], run.blocks.values[1]], torch.empty_like(run.query)
    plan, _ = run.attend()

    def chain(*, pdl):
        out = run.query
        for _ in range(40):
            qkv = layers.thin_matmul(out.view(1, -1), weight, pdl=pdl)
            layers.rotate_and_store(qkv, position, *tables, slot, *blocks, query, pdl=pdl)
            out = run.attention.attend(1, query, plan, run.scoring(), pdl=pdl)
        return out

    wanted = chain(pdl=False)
    assert wanted.isfinite().all()
    chain(pdl=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(pdl=True)
    for _ in range(5):
        found.fill_(math.nan)
        graph.replay()
        assert torch.equal(found, wanted)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_device_that_is_not_here(tmp_path):
    """The interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_attention.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {name for name in vars(kernels) if name.endswith("_kernel")}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("head_size", [64, 80, 128, 192, 256])
def test_configurations_fit_shared_memory(capability, head_size):
    """Keys and values of two steps and the queries; 99 KiB on 8.6, more elsewhere."""
    assert configs_for(capability, head_size, torch.float8_e4m3fn) == configs_for(capability, head_size, torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        configs = configs_for(capability, head_size, dtype)
        row = (1 << (head_size - 1).bit_length()) * dtype.itemsize
        room = 99 * 1024 if capability[0] == 8 else 227 * 1024
        assert (configs.prefill.block_m + 4 * configs.prefill.block_n) * row <= room
        assert (configs.decode.shared_rows + 4 * configs.decode.shared_block_n) * row <= room
        for rows in (1, 16, 17):
            config = configs.decoding(rows)
            assert 2 * (config.num_stages - 1) * config.block_n * row <= room
            assert config.shared_rows == configs.decode.shared_rows
