"""Paged attention with PyTorch's own operators, on any device.

One sequence's consecutive blocks are read in place, as a strided view. Where blocks are scattered, or several
sequences are attended to in one call, their slots are gathered, and entries past a sequence's end are the slot of zeros
(``folo_attention.storage``).

Query heads that share a key head form a dimension of their own, over which keys are broadcast with stride 0 or which
joins the queries': grouped queries repeat nothing in memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from folo_attention.planning import StepPlan
from folo_attention.storage import PagedStorage

if TYPE_CHECKING:
    from folo_attention.planning import Tile
    from folo_core.attention.interface import AttentionMetadata


class Scoring(NamedTuple):
    """What a layer does with query-key products before the softmax."""

    scale: float
    softcap: float | None


class SdpaBackend(PagedStorage):
    """``AttentionBackend`` over ``torch.nn.functional.scaled_dot_product_attention``."""

    wants_device_metadata = False

    def plan(self, metadata: AttentionMetadata) -> StepPlan:
        """Decide which rows are attended to together; index tensors are made when a layer first needs them."""
        dtype = self._keys[0].dtype if self._keys else torch.float32
        return StepPlan(metadata, zero_slot=self._num_slots, device=self._device, dtype=dtype)

    def forward(  # noqa: PLR0913 (the protocol's signature)
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values into their slots, then attend causally (see ``AttentionBackend``)."""
        keys, values = self._write(layer, metadata.slot_mapping, key, value)
        plan = metadata.plan
        if not isinstance(plan, StepPlan):
            raise TypeError(f"metadata.plan: {type(plan).__name__}: give what plan() returned for this step")
        scoring = Scoring(scale, softcap)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for tile in plan.prefill_tiles(sliding_window):
            output[tile.rows] = _attend_rows(query[tile.rows], *self._read(keys, values, tile), tile, scoring)
        if plan.decode_rows is not None:
            queries = query.index_select(0, plan.decode_rows)
            pieces = [
                _attend_batch(queries[tile.rows], *self._read(keys, values, tile), tile, scoring)
                for tile in plan.decode_tiles(sliding_window)
            ]
            output.index_copy_(0, plan.decode_rows, torch.cat(pieces))
        return output

    def _read(self, keys: torch.Tensor, values: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """A tile's keys and values, ``[slots, kv_heads, head_size]``: in place, or gathered."""
        if isinstance(tile.slots, slice):
            return keys[tile.slots], values[tile.slots]
        return self._gather("keys", keys, tile.slots), self._gather("values", values, tile.slots)


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scoring: Scoring
) -> torch.Tensor:
    """A run of one sequence's new tokens: ``query [n, heads, size]`` over ``key, value [m, kv_heads, size]``."""
    num_queries, num_heads, _ = query.shape
    groups = num_heads // key.shape[1]
    # Key heads take the batch dimension, so that each one's keys broadcast over its own group of query heads.
    q = query.unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
    k = key.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    v = value.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    out = _attend(q, k, v, tile, scoring)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, -1)


def _attend_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scoring: Scoring
) -> torch.Tensor:
    """One new token of each of ``b`` sequences: ``query [b, heads, size]``, ``key, value [b * m, kv_heads, size]``."""
    batch, num_heads, _ = query.shape
    q = query.unflatten(1, (key.shape[1], -1))
    k = key.unflatten(0, (batch, -1)).transpose(1, 2)
    v = value.unflatten(0, (batch, -1)).transpose(1, 2)
    return _attend(q, k, v, tile, scoring).reshape(batch, num_heads, -1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, scoring: Scoring) -> torch.Tensor:
    scale, softcap = scoring
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=tile.mask, is_causal=tile.is_causal, scale=scale)
    # Gemma 2 (arXiv:2408.00118, section 2): scores are squashed to (-softcap, softcap) before the mask.
    scores = torch.matmul(q, k.transpose(-1, -2)) * (scale / softcap)
    scores = torch.tanh(scores) * softcap
    if tile.mask is not None:
        scores = scores + tile.mask
    elif tile.is_causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu_(1)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
