"""Builds one step for a policy: the policy decides who, the planner keeps every limit.

Whatever a policy asks, a step never exceeds its budgets, a request's sequences are admitted, extended and
preempted together, and a request samples only when all its sequences reach their newest token.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from folo_core.scheduling.interface import NewSequence, SchedulerOutput
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerState, StepBudget
    from folo_core.sequence import Sequence


class StepPlanner:
    """One step in the making."""

    def __init__(self, state: SchedulerState, budget: StepBudget, order: Callable[[Request], Any]) -> None:
        self.state = state
        self.budget = budget
        self.order = order
        self.output = SchedulerOutput()
        self.tokens_left = budget.max_num_batched_tokens
        self.seqs_left = budget.max_num_seqs - state.num_running_seqs

    def extend(self, request: Request) -> bool:
        """Schedule the next tokens of a running request.

        Returns:
            False if memory is short, and then nothing has changed: preempt somebody and ask again.
            True otherwise, also when no token budget is left and the request sits this step out.
        """
        counts = self._token_counts(request.live)
        if counts is None:
            return True
        return self._grant(request, counts)

    def admit(self, request: Request) -> bool:
        """Move the first waiting request into the step, with all its sequences or not at all.

        Returns:
            False if slots, tokens or memory are short, and then nothing has changed.
        """
        if request.width > self.seqs_left:
            return False
        counts = self._token_counts(request.live)
        if counts is None or not self._grant(request, counts):
            return False
        self.state.waiting.remove(request.request_id)
        bisect.insort(self.state.running, request, key=self.order)
        self.seqs_left -= request.width
        for sequence in request.live:
            sequence.transition(SequenceStatus.RUNNING)
            new = NewSequence(sequence.seq_id, request.request_id, sequence.index, sequence.data.token_ids.copy())
            self.output.new_sequences.append(new)
        return True

    def preempt(self, request: Request) -> None:
        """Take all memory from a running request that this step has not scheduled, and queue it again.

        Its tokens, random positions and text stay; its keys and values are computed anew when it returns.
        """
        self.state.running.remove(request)
        self.seqs_left += request.width
        for sequence in request.live:
            self.state.kv.release(sequence)
            sequence.transition(SequenceStatus.WAITING)
            self.output.released.append(sequence.seq_id)
        request.metrics.num_preemptions += 1
        self.output.preempted.append(request)
        self.state.waiting.push(request)

    def _token_counts(self, sequences: list[Sequence]) -> list[int] | None:
        """Choose how many tokens each sequence runs, within the budget; None if none can run.

        A group samples in lockstep: unless all its sequences reach their newest token in this step,
        those that could are held one token short.
        """
        wanted = [s.num_tokens - s.num_computed_tokens for s in sequences]
        total = sum(wanted)
        if total == 0:
            return None  # its newest token is still on the device
        chunk = self.budget.max_chunk_tokens
        if total <= self.tokens_left and max(wanted) <= chunk:
            return wanted
        if not self.budget.chunked_prefill and total <= self.budget.max_num_batched_tokens:
            return None
        counts, left = [], self.tokens_left
        for want in wanted:
            held_back = want - (len(wanted) > 1)
            count = min(held_back, chunk, left)
            counts.append(count)
            left -= count
        return counts if sum(counts) else None

    def _grant(self, request: Request, counts: list[int]) -> bool:
        """Take memory for the group and write its rows into the step; False if memory is short."""
        live = request.live
        lengths = [0 if s.block_table is None else len(s.block_table.blocks) for s in live]
        copies = self.state.kv.extend(live, counts)
        if copies is None:
            return False
        output = self.output
        for sequence, count, known, copy in zip(live, counts, lengths, copies, strict=True):
            if copy is not None:
                output.copy_sources.append(copy[0])
                output.copy_destinations.append(copy[1])
                known -= 1  # noqa: PLW2901 (the replaced tail entry changed too)
            self._write_row(sequence, count, known)
        self.tokens_left -= sum(counts)
        output.scheduled.append(request)
        return True

    def _write_row(self, sequence: Sequence, count: int, known_blocks: int) -> None:
        """Append one row and advance the sequence's progress, ahead of the device."""
        table = sequence.block_table
        assert table is not None  # noqa: S101 (KVCacheManager.extend has just made it)
        if len(table.blocks) > known_blocks:
            self.output.new_blocks[sequence.seq_id] = (known_blocks, table.blocks[known_blocks:])
        if count == 0:
            return
        sequence.num_computed_tokens += count
        self.output.seq_ids.append(sequence.seq_id)
        self.output.num_new_tokens.append(count)
        self.output.samples.append(sequence.num_computed_tokens == sequence.num_tokens)
