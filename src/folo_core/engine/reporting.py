"""Puts what the engine did into the records that observers get. Nothing is built that nobody asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import attrs

from folo_core.engine.observer import BranchRecord, Observers, RequestEvent, RequestRecord, StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from folo_core.engine.observer import Observer
    from folo_core.execution.interface import RequestSample, StepResult
    from folo_core.kv_cache.manager import KVCacheUsage
    from folo_core.kv_cache.prefix_cache import PrefixCacheStats
    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerOutput, SchedulerState
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True, kw_only=True)
class EngineStats:
    """An engine at one moment: its queues, its memory, and what it has done so far."""

    num_steps: int
    num_waiting: int
    num_running: int
    num_swapped: int
    num_preemptions: int
    """Requests that were preempted, each as often as it was; ``num_swaps`` of these moved to the host."""
    num_swaps: int
    kv: KVCacheUsage
    prefix_cache: PrefixCacheStats
    """A copy."""


class Reporter:
    """Follows one engine's state and tells its observers."""

    def __init__(self, observers: Iterable[Observer], state: SchedulerState) -> None:
        self.observers = Observers(observers)
        self.state = state
        self.step = 0
        """Number of steps that have come back."""
        self.num_preemptions = self.num_swaps = 0

    @property
    def follows_branches(self) -> bool:
        """Whether anybody wants to know what becomes of rows."""
        return bool(self.observers.of_branches)

    def stats(self) -> EngineStats:
        """Return the engine's present state."""
        state = self.state
        return EngineStats(
            num_steps=self.step,
            num_waiting=len(state.waiting),
            num_running=len(state.running),
            num_swapped=state.num_swapped,
            num_preemptions=self.num_preemptions,
            num_swaps=self.num_swaps,
            kv=state.kv.usage(),
            prefix_cache=attrs.evolve(state.kv.stats, num_evicted_blocks=state.kv.pool.num_evicted),
        )

    def on_step(self, scheduled: SchedulerOutput, result: StepResult, started: float) -> None:
        """Tell of a step that has come back; it ``started`` then, in seconds of ``time.perf_counter``."""
        if not self.observers.all:
            return
        state, usage, samples = self.state, self.state.kv.usage(), result.samples
        record = StepRecord(
            step=self.step,
            num_seqs=len(scheduled.seq_ids),
            num_tokens=scheduled.num_tokens,
            num_sampled=sum(len(tokens) for sample in samples for tokens in sample.tokens),
            num_draft_tokens=sum(sample.num_drafts for sample in samples),
            num_accepted_tokens=sum(sum(sample.kept) for sample in samples),
            num_preempted=len(scheduled.preempted),
            num_waiting=len(state.waiting),
            num_running=len(state.running),
            num_swapped=state.num_swapped,
            free_blocks=usage.num_free_blocks,
            cached_blocks=usage.num_cached_blocks,
            total_blocks=usage.num_blocks,
            block_bytes=usage.block_bytes,
            used_host_blocks=usage.num_host_blocks - usage.num_free_host_blocks,
            total_host_blocks=usage.num_host_blocks,
            swapped_out_blocks=len(scheduled.swap_out),
            swapped_in_blocks=len(scheduled.swap_in),
            queried_tokens=state.kv.stats.num_queried_tokens,
            hit_tokens=state.kv.stats.num_hit_tokens,
            tokens_of=scheduled.tokens_by_request(),
            sampled_of={sample.request_id: max(map(len, sample.tokens), default=0) for sample in samples},
            started=started,
            seconds=time.perf_counter() - started,
        )
        self.observers.on_step(record)

    def on_branches(
        self,
        request: Request,
        sample: RequestSample,
        before: list[Sequence],
        rows: list[Sequence],
        lengths: list[int],
    ) -> None:
        """Tell what became of a request's sequences in this step; the rows were ``lengths`` long before it."""
        stated = sample.stated
        record = BranchRecord(
            step=self.step,
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            parents=[before[parent].seq_id for parent in sample.parents],
            rows=[sequence.seq_id for sequence in rows],
            tokens=[s.data.output_token_ids[length:] for s, length in zip(rows, lengths, strict=True)],
            logprobs=None if stated is None else [[] if n else row for n, row in zip(sample.kept, stated, strict=True)],
            scores=[sequence.score for sequence in rows],
            ended={s.seq_id: s.status.value for s in rows if s.is_finished},
            pruned=[s.seq_id for s in before if s not in rows],
            blocks={s.seq_id: s.block_table.blocks.copy() for s in request.live if s.block_table is not None},
        )
        self.observers.on_branches(record)

    def on_scheduled(self, scheduled: SchedulerOutput) -> None:
        """Count preemptions, and tell who starts, leaves and comes back in a step."""
        self.num_preemptions += len(scheduled.preempted)
        swapped = [request for request in scheduled.preempted if request.is_swapped]
        self.num_swaps += len(swapped)
        if not self.observers.of_requests:
            return
        for request in scheduled.preempted:
            self.on_request(request, RequestEvent.SWAPPED_OUT if request in swapped else RequestEvent.PREEMPTED)
        for request in scheduled.resumed:
            self.on_request(request, RequestEvent.SWAPPED_IN)
        for request in scheduled.admitted:
            self.on_request(request, RequestEvent.STARTED)

    def on_request(self, request: Request, event: RequestEvent) -> None:
        """Tell of an event of a request."""
        if not self.observers.of_requests:
            return
        sequences = request.live or request.finished
        record = RequestRecord(
            time=time.perf_counter(),
            step=self.step,
            request_id=request.request_id,
            event=event,
            tenant=request.tenant,
            priority=request.priority,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=max((len(s.data.output_token_ids) for s in sequences), default=0),
            num_sequences=len(sequences),
            num_blocks=_count_blocks(sequences),
            finish_reason=sequences[0].status.finish_reason if sequences else None,
        )
        self.observers.on_request(record)


def _count_blocks(sequences: Iterable[Sequence]) -> int:
    """Count the blocks that sequences take up, on the device or on the host."""
    tables = [s.host_blocks if s.block_table is None else s.block_table.blocks for s in sequences]
    return len({block for table in tables for block in table})
