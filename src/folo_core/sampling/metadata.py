"""The whole-batch view a sampler or logits processor gets: one tensor row per logits row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from folo_core.sampling_params import SamplingParams

_TENSORS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seeds",
    "sequence_indices",
    "positions",
    "slots",
    "scores",
    "tags",
)


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
    places: NDArray[np.int64]
    """int64 ``[rows]``: ``positions`` as the host has them."""
    runs_ahead: bool = False
    """Whether the next step starts before the host knows what comes of this one: ``step`` must not wait."""
    is_behind: NDArray[np.bool_] | None = None
    """bool ``[rows]``, where it runs ahead and rows are re-parented: whether the host has not seen what came of the
    row's last step."""
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
    scores: torch.Tensor
    """float32 ``[rows]``: the number that the strategy gave the row last (``SamplerOutput.scores``); 0 at first."""
    tags: torch.Tensor
    """int64 ``[rows]``: likewise ``SamplerOutput.tags``; 0 at first."""
    drafts: torch.Tensor | None = None
    """int64 ``[rows]``: the drafted token that comes after this row's position, -1 if none; None without any drafts.

    A sequence with ``d`` drafted tokens has ``d + 1`` adjacent rows: the logits before its first drafted token,
    after it, after the second and so on. A child of the ``j``-th of them keeps the first ``j`` drafted tokens.
    """

    @property
    def num_rows(self) -> int:
        """Number of rows being sampled."""
        return len(self.request_ids)

    @property
    def groups(self) -> list[tuple[str, range]]:
        """Each request's id and its rows, in order."""
        starts = [row for row, name in enumerate(self.request_ids) if not row or name != self.request_ids[row - 1]]
        ends = [*starts[1:], self.num_rows]
        return [(self.request_ids[start], range(start, end)) for start, end in zip(starts, ends, strict=True)]

    def select(self, rows: Sequence[int]) -> SamplingMetadata:
        """Return the metadata of these rows, in this order; a row may be named often. Drafts are left out.

        A strategy that draws several tokens from one row gives the copies a ``sequence_indices`` of their own.
        """
        index = torch.tensor(rows, device=self.positions.device)
        tensors = {name: getattr(self, name)[index] for name in _TENSORS}
        return SamplingMetadata(
            **tensors,
            places=self.places[list(rows)],
            request_ids=[self.request_ids[row] for row in rows],
            params=[self.params[row] for row in rows],
            prompt_lengths=[self.prompt_lengths[row] for row in rows],
            history=None if self.history is None else [self.history[row] for row in rows],
            all_greedy=self.all_greedy,
            any_top_k=self.any_top_k,
            any_top_p=self.any_top_p,
            any_min_p=self.any_min_p,
            need_logprobs=self.need_logprobs,
        )
