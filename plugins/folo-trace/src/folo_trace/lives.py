"""What becomes of a request, as its events and the engine's steps tell it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.engine.observer import RequestEvent

if TYPE_CHECKING:
    from folo_core.engine.observer import RequestRecord, StepRecord

QUEUED, RUNNING, PREEMPTED, SWAPPED, FINISHED = "queued", "running", "preempted", "swapped out", "finished"
"""What a request may be at a moment. A preempted one waits to be computed anew, a swapped one lies on the host."""

PREFILL, DECODE = "prefill", "decode"
"""What a step may do for a request: compute tokens that are known, or go on from its newest."""

STATE_AFTER = {
    RequestEvent.QUEUED: QUEUED,
    RequestEvent.STARTED: RUNNING,
    RequestEvent.PREEMPTED: PREEMPTED,
    RequestEvent.SWAPPED_OUT: SWAPPED,
    RequestEvent.SWAPPED_IN: RUNNING,
    RequestEvent.FINISHED: FINISHED,
}


@attrs.define(slots=True, kw_only=True)
class Life:
    """One request from its arrival to its end."""

    request_id: str
    tenant: str
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int = 0
    """Of its longest sequence."""
    state: str = QUEUED
    num_preemptions: int = 0
    num_swaps: int = 0
    num_blocks: int = 0
    """Blocks that it took up when it last changed its state."""
    finish_reason: str | None = None
    _has_sampled: bool = False
    """Since it was last computed from the start."""

    @classmethod
    def begin(cls, record: RequestRecord) -> Life:
        """Return the life of a request whose first event this is."""
        return cls(
            request_id=record.request_id,
            tenant=record.tenant,
            priority=record.priority,
            num_prompt_tokens=record.num_prompt_tokens,
        )

    def follow(self, record: RequestRecord) -> None:
        """Take note of an event."""
        if self.state == RUNNING and record.event in {RequestEvent.PREEMPTED, RequestEvent.SWAPPED_OUT}:
            self.num_preemptions += 1
            self.num_swaps += record.event is RequestEvent.SWAPPED_OUT
        if record.event is RequestEvent.STARTED:
            self._has_sampled = False
        if record.event is not RequestEvent.SWAPPED_IN:
            self.num_blocks = record.num_blocks  # those that come back are those that left
        self.state = STATE_AFTER[record.event]
        self.num_output_tokens = record.num_output_tokens
        self.finish_reason = record.finish_reason

    def ran(self, record: StepRecord) -> str:
        """Take note of a step that it had tokens in, and return whether that was ``prefill`` or ``decode``.

        Until it samples, a request computes what is known: its prompt, and after a preemption its answer so far.
        """
        phase = DECODE if self._has_sampled else PREFILL
        if self.request_id in record.sampled_of:
            self._has_sampled = True
            if self.state != FINISHED:  # the last event has counted all tokens
                self.num_output_tokens += record.sampled_of[self.request_id]
        return phase
