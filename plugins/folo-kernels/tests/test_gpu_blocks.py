"""Blocks on a device are copied and zeroed in all layers at once, whether layers are alike or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_kernels.gpu import blocks as module
from folo_kernels.gpu.blocks import DeviceBlocks, LayerShape

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
on_devices = pytest.mark.parametrize("device", DEVICES)
ALIKE = [LayerShape(kv_heads=2, key_size=8, value_size=8, dtype=torch.float32)] * 3
MIXED = [*ALIKE, LayerShape(kv_heads=1, key_size=8, value_size=4, dtype=torch.bfloat16)]

ROUNDED = [LayerShape(kv_heads=2, key_size=8, value_size=12, dtype=torch.float8_e4m3fn)] * 2


def filled(shapes, device="cpu"):
    blocks = DeviceBlocks(shapes, 9, 4, torch.device(device))
    for cache in blocks.tensors():
        cache.normal_()
    return blocks


@on_devices
@pytest.mark.parametrize("shapes", [ALIKE, MIXED])
def test_layers_have_the_shapes_they_asked_for_and_memory_of_their_own(shapes, device):
    blocks = DeviceBlocks(shapes, 9, 4, torch.device(device))
    for number, cache in enumerate(blocks.tensors()):
        assert not cache.any()
        cache.fill_(number)
    for number, (cache, shape) in enumerate(zip(blocks.keys, shapes, strict=True)):
        assert cache.shape == (9, shape.kv_heads, 4, shape.key_size)
        assert cache.dtype == shape.dtype
        assert cache.is_contiguous()
        assert (cache == number).all()
    for number, (cache, shape) in enumerate(zip(blocks.values, shapes, strict=True), len(shapes)):
        assert cache.shape == (9, shape.kv_heads, 4, shape.value_size)
        assert (cache == number).all()
    assert blocks.bytes_per_block() == 4 * sum(
        s.kv_heads * (s.key_size + s.value_size) * s.dtype.itemsize for s in shapes
    )


@on_devices
@pytest.mark.parametrize("limit", [1, 2**30])
@given(data=st.data())
def test_copies_read_all_sources_before_they_write(device, limit, data):
    blocks = filled(MIXED, device)
    targets = data.draw(st.lists(st.integers(1, 8), unique=True))
    sources = data.draw(st.lists(st.integers(1, 8), min_size=len(targets), max_size=len(targets)))
    before = [cache.clone() for cache in blocks.tensors()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COPY_BYTES", limit)
        blocks.copy(sources, targets)
    for cache, old in zip(blocks.tensors(), before, strict=True):
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(cache[target], old[source])
        kept = [block for block in range(9) if block not in targets]
        assert torch.equal(cache[kept], old[kept])


@on_devices
def test_zeroed_blocks_are_zero_and_others_are_not(device):
    blocks = filled(MIXED, device)
    blocks.zero([3, 1])
    blocks.zero([])
    for cache in blocks.tensors():
        assert not cache[[1, 3]].any()
        assert cache[[0, 2, 4, 8]].flatten(1).any(dim=1).all()


@pytest.mark.gpu
@NO_CUDA
def test_nothing_waits_for_the_device():
    blocks = filled(MIXED, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks.copy([1, 2], [3, 4])
        blocks.zero([5])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_devices
def test_blocks_of_float8_are_copied_and_zeroed(device):
    blocks = DeviceBlocks(ROUNDED, 9, 4, torch.device(device))
    assert blocks.bytes_per_block() == 2 * 4 * 2 * (8 + 12)
    as_bytes = [cache.view(torch.uint8) for cache in blocks.tensors()]
    for cache in as_bytes:
        cache.random_(1, 127)
    before = [cache.clone() for cache in as_bytes]
    blocks.copy([1, 2], [2, 5])
    blocks.zero([7])
    for cache, old in zip(as_bytes, before, strict=True):
        assert torch.equal(cache[[2, 5]], old[[1, 2]])
        assert not cache[7].any()
        rest = [0, 1, 3, 4, 6, 8]
        assert torch.equal(cache[rest], old[rest])
