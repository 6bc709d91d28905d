"""Whether the engine's attention backend gives what float32 gives, for the heads of the models that are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from folo_core.attention.interface import AttentionMetadata, KVCacheSpec
from folo_core.config import EngineConfig
from folo_core.plugins.manager import load_registry

if TYPE_CHECKING:
    from shapes import Shape

TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Largest accepted ratio of the difference's norm to the norm, for one sequence."""

PAST_AND_NEW = ((0, 300), (200, 64), (0, 1), (16, 1), (699, 1), (1024, 1), (63, 1))
"""Tokens of each sequence that a step before has written, and those of the step that is judged: prompts, a chunk of
one, and sequences that decode."""
TINY = ((0, 9), (5, 3), (0, 1), (16, 1))
BLOCK = 16


@attrs.frozen(kw_only=True)
class AttentionCheck:
    """What came out for one model's heads."""

    backend: str
    model: str
    window: int | None
    error: float
    """Of the sequence that is furthest off."""
    holds: bool


def check(shape: Shape, device: str, options: dict[str, Any], *, tiny: bool) -> list[AttentionCheck]:
    """Run the backend that the engine would take, without a window and with one."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    name, config, part = _chosen(device, dtype, options)
    found = []
    for window in (None, 8 if tiny else 100):
        error = _Trial(shape, part.build(config), TINY if tiny else PAST_AND_NEW, device, dtype).error(window)
        holds = error <= TOLERANCE[dtype]
        found.append(AttentionCheck(backend=name, model=shape.name, window=window, error=error, holds=holds))
    return found


def _chosen(device: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[str, EngineConfig, Any]:
    config = EngineConfig.from_options(model="none", max_model_len=2048, **{"max_num_seqs": 256} | options)
    registry = load_registry()
    if config.model.attention != "auto":
        return config.model.attention, config, registry.get("attention_backends", config.model.attention)
    parts: list[Any] = list(registry.all("attention_backends"))
    able = [part for part in parts if part.spec.supports(device, str(dtype).removeprefix("torch.")) is None]
    best = max(able, key=lambda part: int(part.spec.priority))
    return str(best.name), config, best


class _Trial:
    """Sequences with random queries, keys and values over scattered blocks."""

    def __init__(
        self,
        shape: Shape,
        backend: Any,  # noqa: ANN401 (an AttentionBackend)
        sequences: tuple[tuple[int, int], ...],
        device: str,
        dtype: torch.dtype,
    ) -> None:
        torch.manual_seed(0)
        heads, size = shape.config["num_attention_heads"], shape.config["head_dim"]
        self.kv_heads: int = shape.config["num_key_value_heads"]
        self.device, self.sequences, self.backend, self.scale = device, sequences, backend, size**-0.5
        lengths = [past + new for past, new in sequences]
        blocks = [-(-length // BLOCK) for length in lengths]
        free = torch.randperm(sum(blocks)).add_(1).tolist()
        self.tables = np.zeros((len(blocks), max(blocks)), np.int32)
        for row, count in enumerate(blocks):
            self.tables[row, :count], free = free[:count], free[count:]
        spec = KVCacheSpec(num_kv_heads=self.kv_heads, head_size=size, dtype=dtype)
        backend.allocate([spec], sum(blocks) + 1, BLOCK, torch.device(device))
        self.query, self.key, self.value = (
            [torch.randn(length, count, size, device=device).to(dtype) for length in lengths]
            for count in (heads, self.kv_heads, self.kv_heads)
        )

    def error(self, window: int | None) -> float:
        """Write the pasts, then attend from the new tokens; return the largest sequence's relative error."""
        pasts = [(row, 0, past) for row, (past, _) in enumerate(self.sequences) if past]
        self._step(pasts, window)
        parts = [(row, past, past + new) for row, (past, new) in enumerate(self.sequences)]
        errors = []
        for part, got in zip(parts, self._step(parts, window), strict=True):
            wanted = self._exact(*part, window)
            errors.append(float((got.float() - wanted).norm() / wanted.norm()))
        return max(errors)

    def _step(self, parts: list[tuple[int, int, int]], window: int | None) -> list[torch.Tensor]:
        counts = [end - begin for _, begin, end in parts]
        slots = [int(self.tables[row, p // BLOCK]) * BLOCK + p % BLOCK for row, b, e in parts for p in range(b, e)]
        metadata = AttentionMetadata(
            num_tokens=sum(counts),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            seq_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=np.ascontiguousarray(self.tables[[row for row, *_ in parts]]),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
            block_size=BLOCK,
        )
        if self.backend.wants_device_metadata:
            metadata.to_device(torch.device(self.device))
        metadata.plan = self.backend.plan(metadata)
        packed = [torch.cat([of[row][b:e] for row, b, e in parts]) for of in (self.query, self.key, self.value)]
        output = self.backend.forward(0, *packed, metadata, scale=self.scale, sliding_window=window)
        return list(output.split(counts))

    def _exact(self, row: int, begin: int, end: int, window: int | None) -> torch.Tensor:
        """Dense attention in float32, ``[end - begin, heads, size]``."""
        query = self.query[row][begin:end].float().unflatten(1, (self.kv_heads, -1))
        key, value = (of[row][:end].float() for of in (self.key, self.value))
        scores = torch.einsum("qkgd,mkd->kgqm", query, key) * self.scale
        distance = torch.arange(begin, end, device=query.device)[:, None] - torch.arange(end, device=query.device)
        hidden = (distance < 0) | (distance >= (end if window is None else window))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("kgqm,mkd->qkgd", weights, value).flatten(1, 2)
