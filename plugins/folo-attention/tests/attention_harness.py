"""Sequences with random keys and values, cut into chunks over steps, for tests of any backend of this distribution."""

from __future__ import annotations

import math

import attrs
import numpy as np
import torch
from hypothesis import strategies as st

from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import AttentionMetadata, KVCacheSpec

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


def caches(backend):
    """Every layer's keys and values; the first dimension is the block, and writing to them writes to the backend."""
    for name in ("store", "blocks"):
        if hasattr(backend, name):
            return getattr(backend, name).tensors()
    slots, size = backend._num_slots, backend._block_size
    return [cache[:slots].unflatten(0, (-1, size)) for cache in (*backend._keys, *backend._values)]


@st.composite
def cases(draw, chunks=(1, 1, 2, 5, 17, 40)):
    head_size = draw(st.sampled_from([4, 8, 17, 64]))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 4, 16])),
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 4)),
        head_size=head_size,
        v_head_size=draw(st.sampled_from([head_size, head_size, 6])),
        chunks=draw(st.lists(st.lists(st.sampled_from(chunks), min_size=1, max_size=4), min_size=1, max_size=12)),
        window=draw(st.sampled_from([None, None, 1, 3, 16, 100])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        scattered=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


class Harness:
    """A backend with its own blocks, all unused slots of which hold NaN."""

    def __init__(self, case, *, dtype=torch.float32, device="cpu", backend=SdpaBackend, scales=None):
        """``scales`` are those of keys and values in float8; without them they are in ``dtype``."""
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
        self.backend = backend()
        spec = KVCacheSpec(
            num_kv_heads=case.kv_heads,
            head_size=case.head_size,
            dtype=dtype if scales is None else torch.float8_e4m3fn,
            k_scale=1.0 if scales is None else scales[0],
            v_scale=1.0 if scales is None else scales[1],
            v_head_size=None if case.v_head_size == case.head_size else case.v_head_size,
        )
        self.backend.allocate([spec, spec], self.num_blocks, size, self.device)
        for cache in caches(self.backend):
            cache[: self.num_blocks] = math.nan
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

    def run(self, parts, layer=1):
        """Run the parts in one packed step; return each one's output."""
        case, scale = self.case, self.case.head_size**-0.5

        def pack(tensors):
            return torch.cat([tensors[i][begin:end] for i, begin, end in parts]).to(self.device)

        output = self.backend.forward(
            layer, pack(self.queries), pack(self.keys), pack(self.values), self.metadata(parts),
            scale=scale, sliding_window=case.window, softcap=case.softcap,
        )  # fmt: skip
        return output.split([end - begin for _, begin, end in parts])

    def step(self, parts, layer=1):
        """Run the parts in one packed step; return each one's output and what it should be."""
        case, scale = self.case, self.case.head_size**-0.5
        outputs = [output.cpu().double() for output in self.run(parts, layer)]
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
