"""What callers get back. Names and meanings follow vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from folo_core.request import RequestMetrics


@attrs.frozen(slots=True)
class Logprob:
    """One candidate token's log probability (natural) under the model, before any processor or filter."""

    logprob: float
    rank: int
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Candidates at one position: the sampled (or prompt) token first, then the most likely ones."""


@attrs.define(slots=True, kw_only=True)
class CompletionOutput:
    """One ranked candidate. With ``output_kind=DELTA``, text, token ids and logprobs are the newest piece only."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort``, ``error``, or None while it grows."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS."""

    score: float | None = None
    """What its strategy ranked it by; None where nothing was ranked."""

    @property
    def finished(self) -> bool:
        """Whether this candidate has ended."""
        return self.finish_reason is not None


@attrs.define(slots=True, kw_only=True)
class RequestOutput:
    """A request and its candidates so far, best first once finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared."""
    metrics: RequestMetrics | None = None
    error: Exception | None = None
    """Why the request ended in ``error``; None otherwise."""
