"""The Triton backend equals dense float64 attention, and keeps blocks as the others do.

On a machine without CUDA the kernels run in Triton's interpreter; with CUDA the same tests run compiled.
"""

from __future__ import annotations

import importlib.util
import math

import attrs
import pytest
import torch
from attention_harness import TOLERANCE, Case, Harness, caches, cases, check, dense
from hypothesis import given, settings

from folo_attention import plugin
from folo_core.attention.interface import AttentionBackend, SwappingBackend
from folo_core.config import EngineConfig
from folo_kernels.gpu import interpreter

HAS_CUDA = torch.cuda.is_available()
REASON = "with CUDA kernels are compiled" if HAS_CUDA else interpreter.enable()
if not HAS_CUDA and REASON:
    pytest.skip(REASON, allow_module_level=True)

from folo_attention.triton import TritonBackend  # noqa: E402 (Triton reads how to run kernels when it is imported)

SPEC = next(spec for spec in plugin.folo_attention_backends() if spec.name == "triton")
SMALL = Case(4, 1, 2, 8, 8, [[7], [1]], None, None, scattered=False, seed=2)
interpreted = pytest.mark.skipif(REASON is not None, reason=str(REASON))
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def harness(case=SMALL, *, device="cpu", dtype=torch.float32, scales=None, **changes):
    return Harness(attrs.evolve(case, **changes), backend=TritonBackend, device=device, dtype=dtype, scales=scales)


@interpreted
@settings(max_examples=6)
@given(cases((1, 1, 2, 17)))
def test_equals_dense_attention_amid_nan(case):
    """All slots but the sequences' own hold NaN throughout, so equality also proves that none of them is read."""
    check(harness(attrs.evolve(case, chunks=case.chunks[:3])))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@settings(max_examples=40)
@given(case=cases((1, 1, 2, 5, 17, 40, 130)))
def test_compiled_kernels_equal_dense_attention_amid_nan(case):
    """What kernels are compiled for is the same in all examples, since compiling takes seconds."""
    shape = {"block_size": 4, "kv_heads": 3, "groups": 3, "head_size": 17, "v_head_size": 6, "softcap": None}
    check(harness(case, device="cuda", **shape, window=case.window and 16))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0), (150, 5.0)])
def test_prompts_and_single_tokens_share_a_step(dtype, window, softcap):
    chunks = [[30, 1, 1, 7], [1, 1, 1], [5, 1, 240, 1], [64, 1]] * 3
    case = Case(16, 2, 3, 64, 64, chunks, window, softcap, scattered=True, seed=3)
    check(harness(case, device="cuda", dtype=dtype), dtype)


@on_devices
def test_a_nan_in_one_sequence_stays_there(device):
    run = harness(chunks=[[6], [6]], scattered=True, device=device)
    run.step([(0, 0, 5), (1, 0, 5)])
    run.keys[0][5] = math.nan
    (poisoned, _), (got, wanted) = run.step([(0, 5, 6), (1, 5, 6)])
    assert poisoned.isnan().all()
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@on_devices
def test_layers_are_apart(device):
    run = harness(device=device)
    run.step([(0, 0, 7)], layer=1)
    assert run.backend.blocks.keys[0].isnan().all()
    assert run.backend.blocks.values[0].isnan().all()
    assert not run.backend.blocks.values[1][1].isnan().any()


@on_devices
def test_copied_blocks_serve_a_fork_and_the_parent_keeps_its_own(device):
    run = harness(device=device)
    run.step([(0, 0, 7)])
    run.tables[1, :2] = run.num_blocks - 2, run.num_blocks - 1
    run.backend.copy_blocks(run.tables[0, :2].tolist(), run.tables[1, :2].tolist())
    for tensors in (run.queries, run.keys, run.values):
        tensors[1] = torch.cat([tensors[0][:6], torch.randn_like(tensors[0][:1])])
    for index in (1, 0):  # the child writes its own last token first
        ((got, wanted),) = run.step([(index, 6, 7)])
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@on_devices
def test_zeroed_blocks_are_zero_and_others_are_not(device):
    run = harness(chunks=[[12]], device=device)
    for cache in caches(run.backend):
        cache.normal_()
    run.backend.zero_blocks([1, 3])
    for cache in caches(run.backend):
        assert not cache[[1, 3]].any()
        assert cache[2].all()


@on_devices
def test_swapped_blocks_serve_their_sequence_elsewhere(device):
    run = harness(device=device)
    run.backend.allocate_host(4)
    run.step([(0, 0, 6)])
    run.backend.swap_out(run.tables[0, :2].tolist(), [4, 2])
    run.backend.zero_blocks(run.tables[0, :2].tolist())
    run.tables[0, :2] = run.num_blocks - 1, run.num_blocks - 2
    run.backend.swap_in([4, 2], run.tables[0, :2].tolist())
    ((got, wanted),) = run.step([(0, 6, 7)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@on_devices
def test_attending_alone_writes_no_blocks(device):
    run = harness(device=device)
    run.step([(0, 0, 6)])
    metadata = run.metadata([(0, 5, 6)])
    before = [cache.clone() for cache in caches(run.backend)]
    query, scale = run.queries[0][5:6].to(run.device), 8**-0.5
    got = run.backend.attend(1, query, metadata, scale=scale)
    out = torch.full_like(got, math.nan)
    assert run.backend.attend(1, query, metadata, scale=scale, out=out) is out
    assert torch.equal(out, got)
    ((again, _),) = run.step([(0, 5, 6)])
    assert torch.equal(again, got.cpu().double())
    assert all(torch.equal(*map(torch.nan_to_num, pair)) for pair in zip(before, caches(run.backend), strict=True))


@on_devices
@pytest.mark.parametrize("scales", [(0.25, 0.5), (2.0, 0.125)])
def test_keys_and_values_in_float8_are_scaled_there_and_back(device, scales):
    """Attention is exact over what was stored, which is close to what came."""
    run = harness(chunks=[[9, 1], [4]], kv_heads=2, scales=scales, device=device)
    for parts in ([(0, 0, 9)], [(0, 9, 10), (1, 0, 4)]):
        outputs = run.run(parts)
    for (index, begin, end), output in zip(parts, outputs, strict=True):
        slots = [run.tables[index, p // 4] * 4 + p % 4 for p in range(end)]
        stored = [
            cache.cpu().float().transpose(1, 2).flatten(0, 1)[slots] * scale
            for cache, scale in zip((run.backend.blocks.keys[1], run.backend.blocks.values[1]), scales, strict=True)
        ]
        wanted = dense(run.queries[index][begin:end], *stored, scale=8**-0.5, window=None, softcap=None)
        torch.testing.assert_close(output.cpu().double(), wanted, rtol=0, atol=TOLERANCE[torch.float32])
        for found, came in zip(stored, (run.keys[index], run.values[index]), strict=True):
            # Triton's interpreter cuts off, and loses what is carried into the exponent.
            limit = 0.04 if device == "cuda" else 0.15
            assert (found - came).norm() <= limit * came.norm()


@on_devices
def test_blocks_in_float8_are_kept_as_others_are(device):
    run = harness(scales=(0.25, 0.5), device=device)
    run.backend.allocate_host(4)
    as_bytes = [cache.view(torch.uint8) for cache in caches(run.backend)]
    for cache in as_bytes:
        cache.random_(1, 120)
    before = [cache[[1, 2]].clone() for cache in as_bytes]
    run.backend.swap_out([1, 2], [4, 2])
    run.backend.zero_blocks([1, 2])
    assert not any(cache[[1, 2]].any() for cache in as_bytes)
    run.backend.swap_in([4, 2], [1, 2])
    run.backend.copy_blocks([1, 2], [3, 1])
    for cache, old in zip(as_bytes, before, strict=True):
        assert torch.equal(cache[[3, 1]], old)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_nothing_waits_for_the_device():
    run = harness(chunks=[[40], [9]], device="cuda")
    run.backend.allocate_host(4)
    run.step([(0, 0, 39), (1, 0, 9)])
    query = torch.zeros(2, 2, 8, device="cuda")
    metadata = attrs.evolve(run.metadata([(0, 39, 40), (1, 8, 9)]), is_captured=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metadata.plan = run.backend.plan(metadata)
        run.backend.attend(1, query, metadata, scale=1.0)
        run.backend.copy_blocks([1], [2])
        run.backend.swap_out([1], [2])
        run.backend.swap_in([2], [1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_devices
def test_a_foreign_plan_is_refused_by_name(device):
    run = harness(device=device)
    metadata = run.metadata([(0, 0, 7)])
    metadata.plan = None
    inputs = (tensors[0].to(run.device) for tensors in (run.queries, run.keys, run.values))
    with pytest.raises(TypeError, match=r"metadata\.plan: NoneType"):
        run.backend.forward(0, *inputs, metadata, scale=1.0)


def test_the_plugin_offers_the_backend():
    backend = SPEC.factory(EngineConfig(model="demo"))
    assert isinstance(backend, AttentionBackend)
    assert isinstance(backend, SwappingBackend)
    able = [spec for spec in plugin.folo_attention_backends() if spec.name != "native"]
    assert SPEC.priority == max(spec.priority for spec in able), "auto takes it where it can"
    assert SPEC.capabilities == {"fp8-kv", "gqa", "sliding_window", "softcap"}


def test_what_it_does_not_support_is_named(monkeypatch):
    assert "cpu" in SPEC.supports("cpu", "float32")
    assert "float64" in SPEC.supports("cuda", "float64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in SPEC.supports("cuda", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "cuda:1 has 7.5" in SPEC.supports("cuda:1", "float16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert SPEC.supports("cuda:1", "float16") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in SPEC.supports("cuda", "float16")
