"""The whole-batch view a sampler or logits processor gets: one tensor row per logits row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch

    from folo_core.sampling_params import SamplingParams


@attrs.define(slots=True, kw_only=True)
class SamplingMetadata:
    """Parameters and positions of the rows being sampled, aligned with the rows of ``logits``.

    Tensors live on the logits' device and are gathered from persistent per-slot tensors, not rebuilt.
    """

    temperature: torch.Tensor
    """float32 ``[rows]``; 0 means greedy."""
    top_k: torch.Tensor
    """int64 ``[rows]``; ``vocab_size`` when off (never 0 or -1)."""
    top_p: torch.Tensor
    """float32 ``[rows]``; 1.0 when off."""
    min_p: torch.Tensor
    """float32 ``[rows]``; 0.0 when off."""
    seeds: torch.Tensor
    """int64 ``[rows]``: the request's seed (drawn from the engine's seed when the request names none)."""
    sequence_indices: torch.Tensor
    """int64 ``[rows]``: the index of the sequence within its request; part of the random key."""
    positions: torch.Tensor
    """int64 ``[rows]``: number of tokens before the one being sampled; part of the random key."""
    slots: torch.Tensor
    """int64 ``[rows]``: the persistent batch slot of each row; stable while the sequence runs."""
    request_ids: list[str]
    """The request each row belongs to; rows of one request are adjacent and in live-sequence order."""
    params: list[SamplingParams]
    """Each row's parameters, for rare, ragged fields (bias, bad words); hot fields are the tensors above."""
    prompt_lengths: list[int]
    """Number of prompt tokens of each row."""
    history: list[list[int]] | None = None
    """Token ids of each row, prompt and output, when some processor needs history; a view, never to be written."""
    all_greedy: bool = False
    """True when every row has temperature 0."""
    any_top_k: bool = True
    """False when no row limits top_k; likewise for the next two: lets whole passes be skipped."""
    any_top_p: bool = True
    any_min_p: bool = True
    need_logprobs: bool = False
    """True when some row wants log probabilities."""

    @property
    def num_rows(self) -> int:
        """Number of rows being sampled."""
        return len(self.request_ids)
