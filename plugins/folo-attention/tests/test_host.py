"""Blocks that move to the host and back are the same bits, whatever the layers' shapes and wherever they go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_harness import caches
from hypothesis import given
from hypothesis import strategies as st

from folo_attention import host
from folo_attention.fixed import FixedOrderBackend
from folo_attention.native import NativeBackend
from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import KVCacheSpec, SwappingBackend
from folo_kernels.library import why_not

needs_kernels = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

BLOCKS, SIZE = 12, 4
SPECS = [
    KVCacheSpec(num_kv_heads=2, head_size=8, dtype=torch.float32),
    KVCacheSpec(num_kv_heads=1, head_size=6, v_head_size=10, dtype=torch.float32),
]


KINDS = [SdpaBackend, pytest.param(NativeBackend, marks=needs_kernels)]


def filled(num_host_blocks: int, kind: type = SdpaBackend) -> Any:
    backend = kind()
    backend.allocate(SPECS, BLOCKS, SIZE, torch.device("cpu"))
    backend.allocate_host(num_host_blocks)
    for cache in caches(backend):
        cache.normal_()
    return backend


def contents(backend: Any, block: int) -> list[torch.Tensor]:
    return [cache[block].clone() for cache in caches(backend)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("backend", [SdpaBackend, FixedOrderBackend, NativeBackend])
def test_our_backends_can_swap(backend: type) -> None:
    assert isinstance(backend(), SwappingBackend)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_blocks_come_back_as_they_went_to_wherever_they_are_put(kind: type, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, BLOCKS - 1))
    sources, targets = (data.draw(st.permutations(range(1, BLOCKS)))[:count] for _ in range(2))
    hosts = data.draw(st.permutations(range(1, 21)))[:count]
    backend = filled(20, kind)
    before = {block: contents(backend, block) for block in range(BLOCKS)}
    backend.swap_out(sources, hosts)
    assert all(equal(contents(backend, block), before[block]) for block in range(BLOCKS)), "a copy, not a move"
    backend.zero_blocks(list(range(1, BLOCKS)))
    backend.swap_in(hosts, targets)
    for source, target in zip(sources, targets, strict=True):
        assert equal(contents(backend, target), before[source])
    untouched = set(range(1, BLOCKS)) - set(targets)
    assert not any(tensor.any() for block in untouched for tensor in contents(backend, block))
    if kind is SdpaBackend:
        assert not any(cache[-1].any() for cache in (*backend._keys, *backend._values)), "the slot of zeros stays zero"


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_go_in_several_batches(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BUFFER_BYTES", 1)
    backend = filled(11, kind)
    assert backend._host._most == 1
    before = [contents(backend, block) for block in range(1, BLOCKS)]
    blocks = list(range(1, BLOCKS))
    backend.swap_out(blocks, blocks)
    backend.zero_blocks(blocks)
    backend.swap_in(blocks, blocks)
    assert all(equal(contents(backend, block), then) for block, then in zip(blocks, before, strict=True))


def test_neighbouring_host_blocks_are_copied_together() -> None:
    assert list(host._runs([3, 4, 5, 9, 10, 2])) == [(0, 3), (3, 5), (5, 6)]
    assert list(host._runs([7])) == [(0, 1)]
