"""Builds one step for a policy: the policy decides who, the planner keeps every limit.

Whatever a policy asks, a step never exceeds its budgets, a request's sequences are admitted, extended and
preempted together, and a request samples only when all its sequences reach their newest token.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from folo_core.errors import SchedulerError
from folo_core.kv_cache.block_table import blocks_for
from folo_core.scheduling.interface import NewSequence, SchedulerOutput
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerState, StepBudget
    from folo_core.sequence import Sequence


SPARE_SHARE = 16
"""An admission leaves a block for each running sequence, but no more than this share of all blocks."""


class StepPlanner:
    """One step in the making."""

    def __init__(self, state: SchedulerState, budget: StepBudget, order: Callable[[Request], Any]) -> None:
        self.state = state
        self.budget = budget
        self.order = order
        self.output = SchedulerOutput()
        self.tokens_left = budget.max_num_batched_tokens
        self.seqs_left = budget.max_num_seqs - state.num_running_seqs
        self._scheduled: set[str] = set()
        self._underway: set[bytes] = set()
        """Digests of the blocks that this step fills: found from the next step on."""

    def extend(self, request: Request) -> bool:
        """Schedule the next tokens of a running request.

        Returns:
            False if memory is short, and then nothing has changed: preempt somebody and ask again.
            True otherwise, also when no token budget is left and the request sits this step out.
        """
        live = request.live
        if request.reparents and live[0].num_pending:
            return self._extend_unseen(request, live)
        if self._take_one_each(request, live):
            return True
        if any(sequence.block_table is None for sequence in live):
            return self._gather(request)
        return self._advance(request)

    def admit(self, request: Request) -> bool:
        """Move a waiting request into the step, with all its sequences or not at all.

        One that was swapped out is brought back. For another, what it begins with is looked up among the blocks that
        were computed before; if a block that it lacks is being computed in this very step, it waits for it.

        Returns:
            False if slots, tokens or memory are short, or it waits for a block, and then nothing has changed.
        """
        if request.width > self.seqs_left:
            return False
        if request.is_swapped:
            return self._bring_back(request)
        first, kv, target = request.live[0], self.state.kv, _target(request)
        found = [] if request.wants_prompt_logprobs else kv.match(first, target)
        counts = self._first_counts(request, target, len(found))
        if counts is None or not kv.fits(found, len(found) * kv.block_size + counts[0], self._spare(self.seqs_left)):
            return False
        kv.adopt(first, found)
        self._grant(request, [first], counts)
        self.state.waiting.remove(request.request_id)
        self.output.admitted.append(request)
        self._start(request)
        self._introduce(request, [first], len(found) * kv.block_size)
        self._count_hits(request, target, len(found) * kv.block_size)
        return True

    def could_admit(self, request: Request, victims: list[Request]) -> bool:
        """Whether a request would find a place and memory if all of ``victims`` were preempted.

        Nobody yields in vain: blocks of the victims that others hold too are not freed, and what the request finds
        computed is taken, unless others hold it anyway.
        """
        pool = self.state.kv.pool
        places = self.seqs_left + sum(victim.width for victim in victims)
        tables = [s.block_table for victim in victims for s in victim.live if s.block_table is not None]
        held = Counter(block for table in tables for block in table.blocks)
        needed = self._blocks_to_run(request, held)
        if needed is None or places < request.width:
            return False
        freed = sum(pool.references(block) == count for block, count in held.items())
        return needed + self._spare(places) <= pool.num_available + freed

    def can_preempt(self, request: Request) -> bool:
        """Whether this step has not scheduled the request yet: what a step reads or writes cannot be taken away."""
        return request.request_id not in self._scheduled

    def preempt(self, request: Request) -> None:
        """Take all memory from a running request that this step has not scheduled, and queue it again.

        Its tokens, random positions and text stay. Its keys and values move to the host if there is room and that is
        the cheaper way; else they are computed anew when it returns.

        Raises:
            SchedulerError: the step has scheduled the request already; nothing has changed.
        """
        if not self.can_preempt(request):
            message = (
                f"request {request.request_id!r}: this step has scheduled it: preempt another, or preempt it first"
            )
            raise SchedulerError(message)
        self.seqs_left += request.width
        self.output.released += [sequence.seq_id for sequence in request.live]
        request.metrics.num_preemptions += 1
        self.output.preempted.append(request)
        if not self._send_away(request):
            self.state.requeue(request)

    def _send_away(self, request: Request) -> bool:
        """Move a request to the host, if that is worth it and there is room."""
        live, state = request.live, self.state
        blocks = {block for s in live if s.block_table is not None for block in s.block_table.blocks}
        shared = _common_prefix(live) if len(live) > 1 else 0
        tokens = sum(max(s.num_computed_tokens - shared, 0) for s in live) + shared
        # A sequence without a computed token has nothing to move. And what a step in flight will say of a prompt is
        # lost with it: such a prompt is computed anew.
        bare = min(live[0].num_computed_tokens, live[0].num_tokens - 1) < 1
        if bare or request.wants_prompt_logprobs or not state.costs.prefers_swap(tokens, len(blocks)):
            return False
        pairs = state.kv.swap_out(live)
        if pairs is None:
            return False
        self.output.swap_out += pairs
        request.metrics.num_swaps += 1
        state.running.remove(request)
        for sequence in live:
            sequence.draft_token_ids.clear()
            sequence.transition(SequenceStatus.SWAPPED)
        state.waiting.push(request)
        return True

    def _bring_back(self, request: Request) -> bool:
        """Move a request from the host back, and schedule its next tokens if there is room for them too."""
        kv, known = self.state.kv, {s.seq_id: s.num_computed_tokens for s in request.live if s.host_blocks}
        # By itself it fits, as its admission made sure, and nobody would ever leave it more room.
        beside = self._spare(self.seqs_left) + self._blocks_to_go_on(request) if self.state.running else 0
        pairs = kv.swap_in(request.live, beside)
        if pairs is None:
            return False
        self.output.swap_in += pairs
        self.output.resumed.append(request)
        self.state.waiting.remove(request.request_id)
        self._start(request)
        self.extend(request)
        for sequence in request.live:
            if sequence.seq_id in known:
                self._introduce(request, [sequence], known[sequence.seq_id])
        return True

    def _start(self, request: Request) -> None:
        self.state.start(request, self.order)
        self.seqs_left -= request.width
        for sequence in request.live:
            sequence.transition(SequenceStatus.RUNNING)

    def _blocks_to_run(self, request: Request, held: Counter[int]) -> int | None:
        """Count the blocks that a waiting request needs in this step; None if memory would not help it.

        Args:
            request: any that waits.
            held: how many tables of those who would yield hold each block.
        """
        if self.tokens_left <= 0:
            return None
        if request.is_swapped:
            lying = {block for sequence in request.live for block in sequence.host_blocks}
            return len(lying) + self._blocks_to_go_on(request)
        kv, target = self.state.kv, _target(request)
        found = [] if request.wants_prompt_logprobs else kv.match(request.live[0], target)
        counts = self._first_counts(request, target, len(found))
        taken = sum(kv.pool.references(block) == held[block] for block in found)
        return None if counts is None else taken + blocks_for(counts[0], kv.block_size)

    def _first_counts(self, request: Request, target: int, num_found: int) -> list[int] | None:
        """Choose how many tokens a waiting request runs after the blocks it found; None if it cannot run now."""
        if not request.wants_prompt_logprobs and self._awaits(request.live[0], target, num_found):
            return None
        return self._token_counts([target - num_found * self.state.kv.block_size])

    def _blocks_to_go_on(self, request: Request) -> int:
        """Count the blocks that a request on the host may need at once besides those that lie there."""
        ahead = sum(min(s.num_uncomputed_tokens, self.tokens_left) for s in request.live)
        return sum(bool(s.host_blocks) for s in request.live) + ahead // self.state.kv.block_size

    def _spare(self, seqs_left: int) -> int:
        """Blocks that an admission leaves for those who run: the newcomer would soon have to yield them."""
        return min(self.budget.max_num_seqs - seqs_left, self.state.kv.pool.num_usable // SPARE_SHARE)

    def _awaits(self, sequence: Sequence, target: int, num_found: int) -> bool:
        """Whether the next block that a sequence would have to compute is being computed in this step."""
        if (num_found + 1) * self.state.kv.block_size >= target or not self._underway:
            return False
        return sequence.block_digests[num_found + 1] in self._underway

    def _count_hits(self, request: Request, num_tokens: int, num_found: int) -> None:
        stats = self.state.kv.stats
        if request.metrics.num_preemptions:
            stats.num_resumed_tokens += num_found
            return
        request.live[0].num_cached_tokens = num_found
        stats.num_requests += 1
        stats.num_queried_tokens += num_tokens
        stats.num_hit_tokens += num_found

    def _take_one_each(self, request: Request, live: list[Sequence]) -> bool:
        """Schedule the next token of each sequence, if all last blocks have room for it: nearly every row of a step.

        Returns:
            False for every other case, and then nothing has changed: ``_advance`` knows them all.
        """
        count = len(live)
        if self.tokens_left < count:
            return False
        for sequence in live:
            table, computed = sequence.block_table, sequence.num_computed_tokens + 1
            if table is None or computed != sequence.data.num_tokens + sequence.num_pending:
                return False
            if sequence.draft_token_ids or (sequence.num_pending and request.has_all_tokens(sequence)):
                return False
            if count > 1 and not table.has_place():
                return False
        for sequence in live:
            if not sequence.block_table.append_in_place():  # type: ignore[union-attr]  # looked at above
                return False
            self._note_row(request, sequence, 1)
        self._note_request(request, count)
        return True

    def _extend_unseen(self, request: Request, live: list[Sequence]) -> bool:
        """As ``extend``, for a group of which the device alone knows who continues whom.

        Each row gets a block for the case that it continues another one. The group waits for the host if memory is
        short of these, or if more than one step is on its way.
        """
        if live[0].num_pending > 1 or request.has_all_tokens(live[0]) or self.tokens_left < len(live):
            return True
        if not self.state.kv.reserve_spares(live):
            return True
        if not (self._take_one_each(request, live) or self._advance(request)):
            return False
        self.output.unseen.append(request.request_id)
        self.output.spares |= {s.seq_id: s.spare_block for s in live if s.spare_block is not None}
        return True

    def _advance(self, request: Request) -> bool:
        """Schedule the next tokens of a group that is in memory, with its drafts if there is room for them."""
        live = request.live
        if live[0].num_pending and any(map(request.has_all_tokens, live)):
            return True  # its last tokens are on their way
        wanted = [s.data.num_tokens + s.num_pending + len(s.draft_token_ids) - s.num_computed_tokens for s in live]
        counts = self._token_counts(wanted)
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
        kv = self.state.kv
        missing = _common_prefix(request.live) - first.num_computed_tokens
        if missing > 0:
            counts = self._token_counts([missing])
            return counts is None or self._grant(request, [first], counts)
        assert first.block_table is not None  # noqa: S101 (it has computed tokens)
        for sequence in others:
            found = kv.match(sequence, sequence.num_tokens)
            if len(found) * kv.block_size > first.num_computed_tokens:
                kv.adopt(sequence, found)
            else:
                sequence.block_table = first.block_table.fork()
                sequence.num_computed_tokens = first.num_computed_tokens
                sequence.num_indexed_blocks = first.num_indexed_blocks
        known = [sequence.num_computed_tokens for sequence in others]
        if self._advance(request):
            for sequence, num_computed in zip(others, known, strict=True):
                self._introduce(request, [sequence], num_computed)
            return True
        for sequence in others:
            kv.release(sequence)
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
            table = sequence.block_table
            assert table is not None  # noqa: S101 (KVCacheManager.extend has just made it)
            if len(table.blocks) > known:
                output.new_blocks[sequence.seq_id] = (known, table.blocks[known:])
            if count:
                self._note_row(request, sequence, count)
        self._note_request(request, sum(counts))
        return True

    def _note_request(self, request: Request, count: int) -> None:
        """Write into the step that a request runs ``count`` tokens."""
        self.tokens_left -= count
        self.output.scheduled.append(request)
        self.output.tokens_of_scheduled.append(count)
        self._scheduled.add(request.request_id)
        if request.reparents and request.live[0].num_pending:
            self.output.reparented.append(request.request_id)

    def _note_row(self, request: Request, sequence: Sequence, count: int) -> None:
        """Append one row of ``count`` new tokens and advance its sequence's progress, ahead of the device."""
        output, before = self.output, sequence.num_computed_tokens
        computed = sequence.num_computed_tokens = before + count
        digests = sequence.block_digests
        if len(digests) > 1:
            size = self.state.kv.block_size
            self._underway.update(digests[before // size + 1 : computed // size + 1])
        output.seq_ids.append(sequence.seq_id)
        output.num_new_tokens.append(count)
        num_drafts = computed - sequence.data.num_tokens - sequence.num_pending
        output.samples.append(num_drafts >= 0)
        if num_drafts == 0 and request.steady_after is not None and request.runs_ahead(sequence):
            sequence.num_pending += 1
        if sequence.draft_token_ids:
            del sequence.draft_token_ids[max(0, num_drafts) :]


def _target(request: Request) -> int:
    """Return how many leading tokens a request runs before it samples, or before its sequences part."""
    return request.live[0].num_tokens if len(request.live) == 1 else _common_prefix(request.live)


def _common_prefix(sequences: list[Sequence]) -> int:
    """Return how many leading tokens all have in common, short of any one's newest, which must be run to sample."""
    rows = [sequence.data.token_ids for sequence in sequences]
    most = min(map(len, rows)) - 1
    differs = (place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
    return min(most, next(differs, most))
