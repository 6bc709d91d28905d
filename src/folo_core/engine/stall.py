"""Notices that work no longer moves on, and says who holds it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerOutput, SchedulerState

MOST_IDLE_STEPS = 16
"""Steps in a row that may lead nowhere while work waits, before one request is failed by name."""
_SHOWN = 3


class StallWatchdog:
    """Counts steps in a row that lead nowhere.

    Such a step runs nothing; or it preempts, samples nothing, and computes of no request more than was computed of it
    before: a loop in which requests take each other's memory away and give it back.
    """

    def __init__(self) -> None:
        self._idle_steps = 0
        self._most_computed: dict[str, int] = {}

    def is_stalled(self, scheduled: SchedulerOutput) -> bool:
        """Take note of a step; True if it is one too many."""
        if self._moves_on(scheduled):
            self._idle_steps = 0
            return False
        self._idle_steps += 1
        if self._idle_steps < MOST_IDLE_STEPS:
            return False
        self._idle_steps = 0
        self._most_computed.clear()
        return True

    def _moves_on(self, scheduled: SchedulerOutput) -> bool:
        if not scheduled.seq_ids:
            return False
        if any(scheduled.samples) or not scheduled.preempted:
            self._most_computed.clear()
            return True
        further = False
        for request in scheduled.scheduled:
            computed = max(sequence.num_computed_tokens for sequence in request.live)
            if computed > self._most_computed.get(request.request_id, -1):
                self._most_computed[request.request_id] = computed
                further = True
        return further


def find_culprit(state: SchedulerState, scheduled: SchedulerOutput) -> Request:
    """Return whom to fail: who was preempted most often in a loop, else the first in line, else the first to run."""
    if scheduled.preempted:
        return max(scheduled.preempted, key=lambda request: request.metrics.num_preemptions)
    return state.waiting.peek() if state.waiting else state.running[0]


def describe(state: SchedulerState, culprit: Request, scheduler: str) -> str:
    """Say what does not move on, what it would take, and who has it."""
    usage = state.kv.usage()
    tokens = max(sequence.num_tokens for sequence in culprit.live)
    wanted = state.kv.most_blocks(len(culprit.prompt_token_ids), tokens, len(culprit.live))
    holders = sorted(state.running, key=_num_blocks, reverse=True)[:_SHOWN]
    held = ", ".join(f"{request.request_id!r} {_num_blocks(request)}" for request in holders) or "nobody"
    return (
        f"request {culprit.request_id!r}: scheduler {scheduler!r} makes no progress: the request, preempted "
        f"{culprit.metrics.num_preemptions} times, wants {wanted} blocks; of {usage.num_blocks}, "
        f"{usage.num_free_blocks} are free and {usage.num_cached_blocks} cached; most are held by: {held}"
    )


def _num_blocks(request: Request) -> int:
    return len({block for s in request.live if s.block_table is not None for block in s.block_table.blocks})
