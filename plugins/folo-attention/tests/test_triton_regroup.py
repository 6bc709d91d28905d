"""Rows that go on with each other's blocks on the device do so as the host would have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from folo_core.attention.interface import AttentionMetadata, KVCacheSpec, Regrouping, RegroupingBackend
from folo_core.execution.input_batch import PackedStep
from folo_core.execution.regrouping import regroup_on_host
from folo_kernels.gpu import interpreter

HAS_CUDA = torch.cuda.is_available()
REASON = "with CUDA kernels are compiled" if HAS_CUDA else interpreter.enable()
if not HAS_CUDA and REASON:
    pytest.skip(REASON, allow_module_level=True)

from folo_attention.triton import TritonBackend  # noqa: E402 (Triton reads how to run kernels when it is imported)
from folo_kernels.gpu.plan import level  # noqa: E402

BLOCK, BLOCKS = 4, 400
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON))),
    pytest.param("cuda", marks=on_cuda),
]


def a_step(groups: list[tuple[int, int]], num_rows: int, random: np.random.Generator) -> PackedStep:
    """Rows of one new token each; those of a group are equally long, and their first blocks are the same."""
    lengths = random.integers(1, 90, num_rows).astype(np.int32)
    tables = random.permutation(np.arange(1, 1 + num_rows * 23)).astype(np.int32).reshape(num_rows, 23)[:, :23]
    tables = 1 + tables % (BLOCKS // 2)
    for first, count in groups:
        lengths[first : first + count] = lengths[first]
        tables[first : first + count, : int(lengths[first]) // (2 * BLOCK)] = tables[first, 0]
    starts = lengths.astype(np.int64) - 1
    places = tables[np.arange(num_rows), starts // BLOCK].astype(np.int64) * BLOCK + starts % BLOCK
    ones = np.ones(num_rows, dtype=np.int64)
    return PackedStep(
        slots=np.arange(num_rows),
        counts=ones,
        starts=starts,
        sampling=ones > 0,
        drafted=0 * ones,
        tokens=np.stack([ones, starts, places, np.arange(num_rows)]),
        query_start=np.arange(num_rows + 1, dtype=np.int32),
        seq_lens=lengths,
        block_tables=tables,
    )


def backend_of(device: str, dtype: torch.dtype) -> TritonBackend:
    """Two layers of other shapes, filled with random numbers."""
    backend = TritonBackend(max_rows=16, max_model_len=92)
    specs = [
        KVCacheSpec(num_kv_heads=heads, head_size=size, dtype=dtype, v_head_size=8) for heads, size in ((2, 8), (1, 16))
    ]
    backend.allocate(specs, BLOCKS, BLOCK, torch.device(device))
    for place, pool in enumerate(backend.blocks.pools()):
        pool.copy_(torch.randint(0, 100, pool.shape, generator=torch.Generator().manual_seed(place)))
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_the_device_does_what_the_host_would(device, seed, dtype):
    random = np.random.default_rng(seed)
    groups = [(1, 4), (5, 2), (9, 3)] if seed % 2 else [(0, 8)]
    step, spares = a_step(groups, 13, random), np.arange(BLOCKS - 13, BLOCKS, dtype=np.int32)
    parents = np.arange(13)
    for first, count in groups:
        parents[first : first + count] = first + random.integers(0, count, count)
    asked = Regrouping(parents=torch.from_numpy(parents).to(device), groups=groups, spares=spares)
    ours, theirs = backend_of(device, dtype), backend_of(device, dtype)
    metadata = step.metadata(torch.from_numpy(step.tokens[2].copy()).to(device), BLOCK)
    metadata.regrouping = asked
    metadata.plan = ours.plan(metadata)
    assert isinstance(ours, RegroupingBackend)
    before = step.block_tables.copy()
    ours.regroup(metadata)
    regroup_on_host(step, asked, theirs, BLOCK)
    assert (before != step.block_tables).any(), "some row has gone on with other blocks"
    width = metadata.plan.tables.shape[1]
    tables = metadata.plan.part("tables")[: 13 * width].reshape(13, width).cpu().numpy()
    for row, length in enumerate(step.seq_lens.tolist()):
        used = -(-length // BLOCK)
        assert tables[row, :used].tolist() == step.block_tables[row, :used].tolist()
    assert metadata.slot_mapping.tolist() == step.tokens[2].tolist()
    for mine, other in zip(ours.blocks.pools(), theirs.blocks.pools(), strict=True):
        assert torch.equal(mine, other)


def test_only_what_all_rows_of_a_group_share_counts():
    common = np.array([9, 5, 7, 3, 8, 8, 2])
    level(common, [(1, 3), (5, 2)])
    assert common.tolist() == [5, 5, 5, 3, 8, 8, 2]


def test_a_step_that_this_backend_did_not_plan_is_refused():
    backend = TritonBackend()
    metadata = AttentionMetadata(
        num_tokens=1,
        query_start=np.array([0, 1], dtype=np.int32),
        seq_lens=np.ones(1, dtype=np.int32),
        block_tables=np.ones((1, 1), dtype=np.int32),
        slot_mapping=torch.ones(1, dtype=torch.int64),
        block_size=BLOCK,
    )
    with pytest.raises(TypeError, match="give the plan"):
        backend.regroup(metadata)
