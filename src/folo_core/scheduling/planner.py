"""Builds one step for a policy: the policy decides who, the planner keeps every limit.

Whatever a policy asks, a step never exceeds its budgets, a request's sequences are admitted, extended and
preempted together, and a request samples only when all its sequences reach their newest token.
"""

from __future__ import annotations

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
        if any(sequence.block_table is None for sequence in request.live):
            return self._gather(request)
        return self._advance(request)

    def admit(self, request: Request) -> bool:
        """Move the first waiting request into the step, with all its sequences or not at all.

        Returns:
            False if slots, tokens or memory are short, and then nothing has changed.
        """
        if request.width > self.seqs_left:
            return False
        first = request.live[0]
        target = first.num_tokens if len(request.live) == 1 else _common_prefix(request.live)
        counts = self._token_counts([target])
        if counts is None or not self._grant(request, [first], counts):
            return False
        self.state.waiting.remove(request.request_id)
        self.state.start(request, self.order)
        self.seqs_left -= request.width
        for sequence in request.live:
            sequence.transition(SequenceStatus.RUNNING)
        self._introduce(request, [first], 0)
        return True

    def preempt(self, request: Request) -> None:
        """Take all memory from a running request that this step has not scheduled, and queue it again.

        Its tokens, random positions and text stay; its keys and values are computed anew when it returns.
        """
        self.state.running.remove(request)
        self.seqs_left += request.width
        for sequence in request.live:
            self.state.kv.release(sequence)
            sequence.draft_token_ids.clear()
            sequence.transition(SequenceStatus.WAITING)
            self.output.released.append(sequence.seq_id)
        request.metrics.num_preemptions += 1
        self.output.preempted.append(request)
        self.state.waiting.push(request)

    def _advance(self, request: Request) -> bool:
        """Schedule the next tokens of a group that is in memory, with its drafts if there is room for them."""
        live = request.live
        counts = self._token_counts([s.num_tokens + len(s.draft_token_ids) - s.num_computed_tokens for s in live])
        if counts is None:
            return True
        if self._grant(request, live, counts):
            return True
        if not any(sequence.draft_token_ids for sequence in live):
            return False
        for sequence in live:
            sequence.draft_token_ids.clear()
        return self._advance(request)

    def _gather(self, request: Request) -> bool:
        """Bring a preempted group back: its first sequence computes what all share, then the others join it."""
        first, *others = request.live
        missing = _common_prefix(request.live) - first.num_computed_tokens
        if missing > 0:
            counts = self._token_counts([missing])
            return counts is None or self._grant(request, [first], counts)
        assert first.block_table is not None  # noqa: S101 (it has computed tokens)
        shared = first.num_computed_tokens
        for sequence in others:
            sequence.block_table = first.block_table.fork()
            sequence.num_computed_tokens = shared
        if self._advance(request):
            self._introduce(request, others, shared)
            return True
        for sequence in others:
            self.state.kv.release(sequence)
        return False

    def _introduce(self, request: Request, sequences: list[Sequence], num_computed: int) -> None:
        """Tell the executor of sequences that it does not know, with the tokens that others computed for them."""
        for s in sequences:
            tokens = s.data.token_ids.copy()
            new = NewSequence(s.seq_id, request.request_id, s.index, tokens, num_computed, s.score, s.tag)
            self.output.new_sequences.append(new)
            assert s.block_table is not None  # noqa: S101 (it has just been given room)
            self.output.new_blocks[s.seq_id] = (0, s.block_table.blocks.copy())

    def _token_counts(self, wanted: list[int]) -> list[int] | None:
        """Choose how many tokens each sequence of a group runs, within the budget; None if none can run.

        A group samples in lockstep: unless all its sequences reach their newest token in this step,
        those that could are held one token short.
        """
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

    def _grant(self, request: Request, sequences: list[Sequence], counts: list[int]) -> bool:
        """Take memory for a group's sequences and write their rows into the step; False if memory is short."""
        lengths = [0 if s.block_table is None else len(s.block_table.blocks) for s in sequences]
        copies = self.state.kv.extend(sequences, counts)
        if copies is None:
            return False
        output = self.output
        for sequence, count, known, copy in zip(sequences, counts, lengths, copies, strict=True):
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
        num_drafts = sequence.num_computed_tokens - sequence.num_tokens
        self.output.samples.append(num_drafts >= 0)
        del sequence.draft_token_ids[max(0, num_drafts) :]


def _common_prefix(sequences: list[Sequence]) -> int:
    """Return how many leading tokens all have in common, short of any one's newest, which must be run to sample."""
    rows = [sequence.data.token_ids for sequence in sequences]
    most = min(map(len, rows)) - 1
    differs = (place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
    return min(most, next(differs, most))
