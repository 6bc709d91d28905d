"""The native backend equals dense float64 attention, and keeps blocks as the others do."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from attention_harness import TOLERANCE, Case, Harness, caches, cases, check
from hypothesis import given, settings

from folo_attention.native import NativeBackend
from folo_attention.plugin import folo_attention_backends
from folo_core.attention.interface import AttentionBackend
from folo_kernels import library as native

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
SPEC = next(spec for spec in folo_attention_backends() if spec.name == "native")
SMALL = Case(4, 1, 2, 8, 8, [[7], [1]], None, None, scattered=False, seed=2)


def harness(case=SMALL, **changes):
    return Harness(attrs.evolve(case, **changes), backend=NativeBackend)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(cases((1, 1, 2, 5, 17, 40, 130)))
def test_equals_dense_attention_amid_nan(case):
    """All slots but the sequences' own hold NaN throughout, so equality also proves that none of them is read."""
    check(harness(case))


@needs_kernels
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0), (150, 5.0)])
def test_prompts_and_single_tokens_share_a_step(window, softcap):
    chunks = [[30, 1, 1, 7], [1, 1, 1], [5, 1, 240, 1], [64, 1]] * 3
    check(Harness(Case(16, 2, 3, 64, 64, chunks, window, softcap, scattered=True, seed=3), backend=NativeBackend))


@needs_kernels
def test_a_nan_in_one_sequence_stays_there():
    run = harness(chunks=[[6], [6]], scattered=True)
    run.step([(0, 0, 5), (1, 0, 5)])
    run.keys[0][5] = math.nan
    (poisoned, _), (got, wanted) = run.step([(0, 5, 6), (1, 5, 6)])
    assert poisoned.isnan().all()
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@needs_kernels
def test_layers_are_apart():
    run = harness()
    run.step([(0, 0, 7)], layer=1)
    assert run.backend.store.keys[0].isnan().all()
    assert run.backend.store.values[0].isnan().all()
    assert not run.backend.store.values[1][1, :, :, :8].isnan().any()


@needs_kernels
def test_copied_blocks_serve_a_fork_and_the_parent_keeps_its_own():
    run = harness()
    run.step([(0, 0, 7)])
    run.tables[1, :2] = run.num_blocks - 2, run.num_blocks - 1
    run.backend.copy_blocks(run.tables[0, :2].tolist(), run.tables[1, :2].tolist())
    for tensors in (run.queries, run.keys, run.values):
        tensors[1] = torch.cat([tensors[0][:6], torch.randn_like(tensors[0][:1])])
    for index in (1, 0):  # the child writes its own last token first
        ((got, wanted),) = run.step([(index, 6, 7)])
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@needs_kernels
def test_zeroed_blocks_are_zero_and_others_are_not():
    run = harness(chunks=[[12]])
    for cache in caches(run.backend):
        cache.normal_()
    run.backend.zero_blocks([1, 3])
    for cache in caches(run.backend):
        assert not cache[[1, 3]].any()
        assert cache[2].all()


@needs_kernels
def test_swapped_blocks_serve_their_sequence_elsewhere():
    run = harness()
    run.backend.allocate_host(4)
    run.step([(0, 0, 6)])
    run.backend.swap_out(run.tables[0, :2].tolist(), [4, 2])
    run.backend.zero_blocks(run.tables[0, :2].tolist())
    run.tables[0, :2] = run.num_blocks - 1, run.num_blocks - 2
    run.backend.swap_in([4, 2], run.tables[0, :2].tolist())
    ((got, wanted),) = run.step([(0, 6, 7)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[torch.float32])


@needs_kernels
def test_no_blocks_to_copy_or_zero_is_no_error():
    backend = harness().backend
    backend.copy_blocks([], [])
    backend.zero_blocks([])


@needs_kernels
def test_a_foreign_plan_is_refused_by_name():
    run = harness()
    metadata = run.metadata([(0, 0, 7)])
    metadata.plan = None
    with pytest.raises(TypeError, match=r"metadata\.plan: NoneType"):
        run.backend.forward(0, run.queries[0], run.keys[0], run.values[0], metadata, scale=1.0)


@needs_kernels
def test_the_plugin_offers_the_backend():
    assert isinstance(SPEC.factory(None), AttentionBackend)
    assert SPEC.supports("cpu", "float32") is None
    assert SPEC.priority == max(spec.priority for spec in folo_attention_backends()), "auto takes it where it can"
    assert SPEC.capabilities == {"gqa", "sliding_window", "softcap"}


def test_what_it_does_not_support_is_named(monkeypatch):
    assert "cuda:1" in SPEC.supports("cuda:1", "float32")
    assert "bfloat16" in SPEC.supports("cpu", "bfloat16")

    def load():
        raise native.KernelsUnavailableError("no compiler in sight")

    monkeypatch.setattr(native, "load", load)
    assert SPEC.supports("cpu", "float32") == "no compiler in sight"
