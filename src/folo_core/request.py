"""A request: what was asked, once and unchangeably, and the sequences that answer it."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import attrs

from folo_core.sequence import Sequence, SequenceData, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folo_core.outputs import TokenLogprobs
    from folo_core.sampling_params import SamplingParams


@attrs.define(slots=True)
class RequestMetrics:
    """Moments of a request's life, in seconds of ``time.monotonic``; None until they have passed."""

    arrival_time: float = attrs.field(factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_swaps: int = 0
    """Preemptions that moved its keys and values to the host rather than dropping them."""
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0
    """Drafted tokens that the model judged."""
    num_accepted_tokens: int = 0
    """Those of them that the sampler kept."""

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that was kept; None without any drafts."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def queue_time(self) -> float | None:
        """Seconds between arrival and the first step that ran any of the request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds between arrival and the first output token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds per sequence between output tokens after the first; None before the second."""
        if self.first_token_time is None or self.last_token_time is None or self.num_generated_tokens < 2:  # noqa: PLR2004 (two tokens make one gap)
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_generated_tokens - 1)

    def record_tokens(self, now: float, count: int) -> None:
        """Note that the longest sequence grew by ``count`` tokens at ``now``."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now
        self.num_generated_tokens += count


@attrs.frozen(slots=True, kw_only=True, eq=False)
class Request:
    """What a caller asked for. Frozen; the lists it owns hold the sequences that answer it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    """Resolved: token forms of stop conditions filled in, max_tokens never None."""
    seed: int
    """The params' seed, or one drawn from the engine's."""
    prompt: str | None = None
    tenant: str = ""
    """Whom it serves: for schedulers that share out fairly. What one tenant computed is never found by another."""
    prefix_root: bytes = b""
    """What the digests of its blocks begin with: equal for requests that may share what they have computed."""
    priority: int = 0
    """Lower runs earlier, under schedulers that look at it."""
    arrival: int = 0
    """Running number of arrival: ties in any order are broken by it."""
    sampler: str = ""
    """Name of the sampler that the params class picked."""
    width: int = 1
    """Most sequences that may live at once; admission reserves this many places."""
    steady_after: int | None = None
    """From how many output tokens on each of its sequences grows by one token in every step that samples it, and by
    nothing else, so that steps may be scheduled ahead of what the host knows. None: never."""
    reparents: bool = False
    """Whether its sequences may continue one another where they run ahead: which, the device decides. Then each is as
    the host last knew it, and stands for a row of the request rather than for one hypothesis."""
    live: list[Sequence] = attrs.field(factory=list)
    """Unfinished sequences, in row order."""
    finished: list[Sequence] = attrs.field(factory=list)
    """Ended sequences that a caller may still see, in the order they ended."""
    metrics: RequestMetrics = attrs.field(factory=RequestMetrics)
    prompt_logprobs: list[TokenLogprobs | None] = attrs.field(factory=list)
    """One per prompt token, None first, filled chunk by chunk when asked for."""
    _indices: Iterator[int] = attrs.field(factory=itertools.count, init=False, repr=False)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self.live

    @property
    def is_swapped(self) -> bool:
        """Whether its keys and values lie on the host."""
        return bool(self.live) and self.live[0].status is SequenceStatus.SWAPPED

    def runs_ahead(self, sequence: Sequence) -> bool:
        """Whether the next token that a step samples for one of its sequences may stay on the device for a while."""
        after = self.steady_after
        if after is None or (self.reparents and len(self.live) < self.width):
            return False
        return len(sequence.data.output_token_ids) + sequence.num_pending >= after

    def has_all_tokens(self, sequence: Sequence) -> bool:
        """Whether steps in flight bring the last token that the request has room for: one more would be in vain."""
        if not sequence.num_pending:
            return False
        return len(sequence.data.output_token_ids) + sequence.num_pending >= (self.params.max_tokens or 0)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log probabilities were asked for and are not all there yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    def get_seqs(self, status: SequenceStatus | None = None) -> list[Sequence]:
        """Return all sequences, or those in ``status``: ended ones first, then live ones in row order."""
        sequences = [*self.finished, *self.live]
        return sequences if status is None else [s for s in sequences if s.status is status]

    def open_sequence(self, seq_id: int) -> Sequence:
        """Start the request's first sequence."""
        data = SequenceData(self.prompt_token_ids)
        sequence = Sequence(seq_id=seq_id, index=next(self._indices), data=data, block_digests=[self.prefix_root])
        if self.params.logprobs is not None:
            sequence.logprobs = []
            sequence.data.cumulative_logprob = 0.0
        self.live.append(sequence)
        return sequence

    def branch_from(self, parent: Sequence, at: int | None, seq_id: int) -> Sequence:
        """Start the request's first sequence with the first ``at`` output tokens of another request's, or all."""
        sequence = self.open_sequence(seq_id)
        sequence.data.output_token_ids += parent.data.output_token_ids[:at]
        if sequence.logprobs is not None and parent.logprobs is not None:
            sequence.logprobs += parent.logprobs[:at]
            first_of = (next(iter(entry.values())).logprob for entry in sequence.logprobs)
            sequence.data.cumulative_logprob = sum(first_of, 0.0)
        return sequence

    def fork_sequence(self, parent: Sequence, seq_id: int, *, with_memory: bool = True) -> Sequence:
        """Return a child of ``parent`` under the request's next index. The caller places it among ``live``."""
        return parent.fork(seq_id=seq_id, index=next(self._indices), with_memory=with_memory)

    def close_sequence(self, sequence: Sequence, status: SequenceStatus) -> None:
        """End a live sequence in ``status`` and keep it for the caller."""
        sequence.transition(status)
        self.live.remove(sequence)
        self.finished.append(sequence)
