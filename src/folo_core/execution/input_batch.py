"""The persistent batch: a slot per sequence in fixed arrays, edited in place and never rebuilt.

Host arrays are numpy; the sampling columns also live on the device and are copied there only after a change.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from folo_core.attention.interface import AttentionMetadata, Regrouping
from folo_core.execution.transfer import to_device
from folo_core.sampling.identity import identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from folo_core.request import Request
    from folo_core.scheduling.interface import Fork, NewSequence, SchedulerOutput

_COLUMNS = {
    np.float32: ("temperature", "top_p", "min_p", "scores"),
    np.int64: ("top_k", "seeds", "sequence_indices", "tags"),
}
"""The sampling columns. Those of one type lie in one array, and are copied and gathered at once."""


PENDING = -1
"""Stands for a token that the device has sampled and the host has not seen."""


@attrs.define(slots=True, kw_only=True)
class PackedStep:
    """One step's tokens, end to end without padding, and the rows that want logits."""

    slots: NDArray[np.int64]
    """``[num_seqs]``: the batch slot of each scheduled sequence."""
    counts: NDArray[np.int64]
    """``[num_seqs]``: new tokens of each."""
    starts: NDArray[np.int64]
    """``[num_seqs]``: position of each one's first new token."""
    sampling: NDArray[np.bool_]
    """``[num_seqs]``: whether the next token is sampled."""
    drafted: NDArray[np.int64]
    """``[num_seqs]``: how many of the new tokens are drafts."""
    tokens: NDArray[np.int64]
    """``[4, num_tokens]``: each new token's id (``PENDING`` where the device alone knows it), its position, the slot of
    KV memory that it is written to, and its sequence's batch slot."""
    query_start: NDArray[np.int32]
    """``[num_seqs + 1]``, as in ``AttentionMetadata``; likewise ``seq_lens`` and ``block_tables``."""
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    regrouping: Regrouping | None = None
    """As in ``AttentionMetadata``."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence runs one token and samples the next: a step like most others."""
        return self.tokens.shape[1] == len(self.slots) and bool(self.sampling.all())

    def metadata(self, slot_mapping: torch.Tensor, block_size: int) -> AttentionMetadata:
        """Return what attention layers are told of the step."""
        return AttentionMetadata(
            num_tokens=self.tokens.shape[1],
            query_start=self.query_start,
            seq_lens=self.seq_lens,
            block_tables=self.block_tables,
            slot_mapping=slot_mapping,
            block_size=block_size,
            regrouping=self.regrouping,
        )


_UNDECIDED, _DONE = -1, -2


@attrs.define(slots=True, eq=False)
class Move:
    """What one step's re-parenting made of some slots, until the host's tables say so as well."""

    slots: NDArray[np.int64]
    claims: NDArray[np.int64]
    """Whose the slots were; likewise ``places``: how many tokens each had."""
    places: NDArray[np.int64]
    parents: NDArray[np.int64] | None = None
    """Which of them each continues, once the host knows."""
    late: NDArray[np.int64] = attrs.field(init=False)
    """1 where the next step began before the host knew, else 0; below 0 while there is none, and afterwards."""

    @late.default
    def _undecided(self) -> NDArray[np.int64]:
        return np.full(len(self.slots), _UNDECIDED)


class InputBatch:
    """Token ids, block tables and sampling parameters of every sequence the executor knows."""

    def __init__(
        self, *, capacity: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self.version = 0
        """Grows whenever a slot changes hands; what was gathered before is stale then."""
        # One token past max_model_len: the last sampled token is stored, though never run.
        self.token_ids = np.zeros((capacity, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(capacity, dtype=np.int64)
        self.num_computed = np.zeros(capacity, dtype=np.int64)
        self.block_tables = np.zeros((capacity, -(-(max_model_len + 1) // block_size)), dtype=np.int32)
        self._tables: list[NDArray[Any]] = [np.zeros((len(n), capacity), dtype=dtype) for dtype, n in _COLUMNS.items()]
        """The columns of each type, ``[columns, capacity]``; ``columns`` are views of these, by name."""
        self.columns: dict[str, NDArray[Any]] = _by_name(self._tables)
        self.requests: list[Request | None] = [None] * capacity
        self.histories: list[list[int] | None] = [None] * capacity
        self.keeps_history = np.zeros(capacity, dtype=np.bool_)
        """Which slots have a list in ``histories``; likewise ``judges_prompt``: whose request asked for the log
        probabilities of its prompt."""
        self.judges_prompt = np.zeros(capacity, dtype=np.bool_)
        self.last_tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        """Where steps that run ahead leave the token that they sampled, for the next one to run."""
        self.claims = np.zeros(capacity, dtype=np.int64)
        """Which time it is that each slot was taken, over all slots: what was noted of an earlier owner is void."""
        self._slots: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._device_tables: list[torch.Tensor] = []
        self._device_columns: dict[str, torch.Tensor] = {}
        self._changed: set[int] = set()
        """Slots of which the device does not know the columns yet."""
        self._parents = torch.arange(capacity, device=device)
        """The slot that each one continues since its last such step, on the device."""
        self._rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        """Room for the row of each slot in a step."""
        self.moves: list[Move] = []
        """What re-parenting the tables do not show yet, oldest first."""
        self._spares = np.zeros(capacity, dtype=np.int32)
        self._num_claims = 0
        self._noted_at = np.zeros(capacity, dtype=np.int64)
        """How many tokens each slot had when the host learnt its score and tag."""

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._slots

    def slots_of(self, seq_ids: SequenceOf[int]) -> NDArray[np.int64]:
        """Return the slots of sequences, int64 ``[len(seq_ids)]``."""
        slots = self._slots
        return np.array([slots[seq_id] for seq_id in seq_ids], dtype=np.int64)

    def add(self, new: NewSequence, request: Request, *, keep_history: bool) -> None:
        """Give a new or resumed sequence a slot."""
        slot = self._claim(new.seq_id)
        count = len(new.token_ids)
        self.token_ids[slot, :count] = new.token_ids
        self.num_tokens[slot] = count
        self.num_computed[slot] = new.num_computed
        self._write_params(slot, request, new.index, new.score, new.tag)
        self._keep_history(slot, new.token_ids if keep_history else None)

    def fork(self, forks: SequenceOf[Fork]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give forks slots: their parents' rows up to the fork, then their own tokens, and the parents' parameters.

        Returns:
            The parents' slots and the forks', int64 ``[len(forks)]``.
        """
        parents = self.slots_of([fork.parent_id for fork in forks])
        slots = np.array([self._claim(fork.child_id) for fork in forks], dtype=np.int64)
        ends = [fork.num_tokens for fork in forks]
        longest = max(ends)
        self.token_ids[slots, :longest] = self.token_ids[parents, :longest]
        for fork, slot, end in zip(forks, slots.tolist(), ends, strict=True):
            self.token_ids[slot, end : end + len(fork.tail)] = fork.tail
            self.block_tables[slot, : len(fork.blocks)] = fork.blocks
        self.num_tokens[slots] = [end + len(fork.tail) for fork, end in zip(forks, ends, strict=True)]
        self.num_computed[slots] = [fork.num_computed for fork in forks]
        for table in self._tables:
            table[:, slots] = table[:, parents]
        self.columns["sequence_indices"][slots] = [fork.index for fork in forks]
        self.columns["scores"][slots] = [fork.score for fork in forks]
        self.columns["tags"][slots] = [fork.tag for fork in forks]
        self.judges_prompt[slots] = self.judges_prompt[parents]
        for slot, parent in zip(slots.tolist(), parents.tolist(), strict=True):
            self.requests[slot] = self.requests[parent]
            self._keep_own_history(slot, keep=self.histories[parent] is not None)
        return parents, slots

    def give(self, slot: int, request: Request, fork: Fork, *, keep_history: bool) -> None:
        """Make a fork's slot another request's than its parent's, whose parameters count from here on."""
        self._write_params(slot, request, fork.index, fork.score, fork.tag)
        self._keep_own_history(slot, keep=keep_history)

    def remove(self, seq_id: int) -> None:
        """Free a sequence's slot; unknown ids are ignored, since a sequence may end before it ever ran."""
        slot = self._slots.pop(seq_id, None)
        if slot is None:
            return
        self.requests[slot] = None
        self.claims[slot] = 0
        self._keep_history(slot, None)
        self._free.append(slot)
        self.version += 1

    def set_blocks(self, changes: Mapping[int, tuple[int, list[int]]]) -> None:
        """Overwrite block table entries: of each sequence from the first on that changed (``new_blocks`` of a step)."""
        rows, places, values = list[int](), list[int](), list[int]()
        for seq_id, (first, blocks) in changes.items():
            rows += [self._slots[seq_id]] * len(blocks)
            places += range(first, first + len(blocks))
            values += blocks
        self.block_tables[rows, places] = values

    def append(self, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Store sampled tokens, ``[rows, k]`` with -1 as padding, behind each slot's newest token.

        A row that gets none will run its newest token again.
        """
        before = self.num_tokens[slots]
        for column in tokens.T:
            valid = column >= 0
            rows = slots if valid.all() else slots[valid]
            self.token_ids[rows, self.num_tokens[rows]] = column[valid]
            self.num_tokens[rows] += 1
        self.num_computed[slots] = before - (self.num_tokens[slots] == before)
        self._extend_histories(slots, tokens)

    def advance(self, slots: NDArray[np.int64]) -> None:
        """Give each slot a token that the device alone knows, behind its newest one."""
        before = self.num_tokens[slots]
        self.token_ids[slots, before] = PENDING
        self.num_tokens[slots] = before + 1
        self.num_computed[slots] = before

    def settle(
        self, slots: NDArray[np.int64], claims: NDArray[np.int64], places: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Note tokens that ``advance`` left pending at ``places``, where the slots are still those of ``claims``.

        Returns:
            bool ``[rows]``: which are.
        """
        same: NDArray[np.bool_] = self.claims[slots] == claims
        self.token_ids[slots[same], places[same]] = tokens[same]
        return same

    def reparent(self, slots: NDArray[np.int64], where: torch.Tensor, parents: torch.Tensor) -> Move:
        """Note on the device which slot each of these continues from here on.

        Args:
            slots: slots that ``advance`` gives a token next.
            where: the same, int64 on the device.
            parents: int64 ``[len(slots)]`` on the device, counted among ``slots``.
        """
        self._parents.index_copy_(0, where, where[parents])
        move = Move(slots, self.claims[slots], self.num_tokens[slots])
        self.moves.append(move)
        return move

    def learn(self, move: Move, parents: NDArray[np.int64]) -> None:
        """Take note on the host of what ``reparent`` noted on the device: ``parents``, counted among its slots."""
        move.parents = parents
        valid = (self.claims[move.slots] == move.claims) & (parents != np.arange(len(parents)))
        target, source = move.slots[valid], move.slots[parents[valid]]
        if len(target):
            most = int(move.places[valid].max())
            self.token_ids[target, :most] = self.token_ids[source, :most]
        self._settle_tables()

    def begin_step(self, slots: NDArray[np.int64], unseen: NDArray[np.bool_]) -> None:
        """Learn of the slots of the next step whether its blocks were given before the host knew what ``reparent`` did.

        Those where the host knew get their tables now.
        """
        late = np.full(self.capacity, _UNDECIDED)
        late[slots] = unseen
        for move in self.moves:
            open_ = move.late == _UNDECIDED
            move.late[open_] = late[move.slots[open_]]
        self._settle_tables(late=False)

    def _settle_tables(self, *, late: bool | None = None) -> None:
        """Give slots the tables of those that they continue, where it is known which and how."""
        for move in self.moves:
            move.late[self.claims[move.slots] != move.claims] = _DONE
            if move.parents is not None:
                ready = move.late >= 0 if late is None else move.late == late
                self._copy_tables(move, move.parents, ready)
                move.late[ready] = _DONE
        self.moves = [move for move in self.moves if (move.late != _DONE).any()]

    def _copy_tables(self, move: Move, parents: NDArray[np.int64], ready: NDArray[np.bool_]) -> None:
        """Do it for those that are ``ready``."""
        valid = ready & (parents != np.arange(len(parents)))
        if not valid.any():
            return
        target, source, late = move.slots[valid], move.slots[parents[valid]], move.late[valid] == 1
        last, offset = np.divmod(move.places[valid], self.block_size)
        # Where the next step has begun, the block that it writes to is each row's own (see Regrouping).
        kept = last + (~late & (offset > 0))
        width = int(kept.max())
        tables, before = self.block_tables, np.arange(width) < kept[:, None]
        tables[target, :width] = np.where(before, tables[source, :width], tables[target, :width])
        copied = late & (offset > 0)
        tables[target[copied], last[copied]] = self._spares[target[copied]]

    def set_spares(self, spares: Mapping[int, int]) -> None:
        """Note each sequence's block for the case that it continues another one."""
        self._spares[self.slots_of(list(spares))] = list(spares.values())

    def regrouping(self, step: PackedStep, unseen: NDArray[np.bool_]) -> Regrouping:
        """Return whose blocks the rows of a step go on with, for those that are ``unseen``: bool ``[num_seqs]``."""
        slots = step.slots
        where = to_device(slots, self.device)
        self._rows.index_copy_(0, where, identity(len(slots), self.device))
        return Regrouping(
            parents=self._rows[self._parents[where]],
            groups=self._groups(slots, np.flatnonzero(unseen).tolist()),
            spares=self._spares[slots],
        )

    def _groups(self, slots: NDArray[np.int64], rows: list[int]) -> list[tuple[int, int]]:
        """Return first row and number of rows of each request that these rows, adjacent for each, belong to."""
        owners = [self.requests[slot] for slot in slots[rows].tolist()]
        starts = [place for place, owner in enumerate(owners) if not place or owner is not owners[place - 1]]
        return [(rows[start], end - start) for start, end in itertools.pairwise([*starts, len(rows)])]

    def accept(self, slots: NDArray[np.int64], kept: NDArray[np.int64]) -> None:
        """Make the first ``kept[i]`` drafted tokens of each slot its own."""
        for slot, count in zip(slots.tolist(), kept.tolist(), strict=True):
            if count:
                start = self.num_tokens[slot]
                own = self.token_ids[slot : slot + 1, start : start + count]
                self._extend_histories(np.array([slot]), own)
        self.num_tokens[slots] += kept

    def set_drafts(self, slots: NDArray[np.int64], drafts: NDArray[np.int64]) -> None:
        """Store drafted tokens, ``[rows, d]`` with -1 as padding, behind each slot's newest token: not its own yet."""
        room = self.token_ids.shape[1] - self.num_tokens[slots]
        for place, column in enumerate(drafts.T):
            valid = (column >= 0) & (place < room)
            rows = slots[valid]
            self.token_ids[rows, self.num_tokens[rows] + place] = column[valid]

    def set_state(
        self, slots: NDArray[np.int64], scores: NDArray[np.float32] | None, tags: NDArray[np.int64] | None
    ) -> None:
        """Store what strategies keep with their rows."""
        if scores is None and tags is None:
            return
        self.note_state(slots, self.num_tokens[slots], scores, tags)
        self._changed.update(slots.tolist())
        self.version += 1

    def keep_state(self, slots: torch.Tensor, scores: torch.Tensor | None, tags: torch.Tensor | None) -> None:
        """As ``set_state``, for values that the device alone knows; ``note_state`` tells the host of them later."""
        for name, values in (("scores", scores), ("tags", tags)):
            if values is not None:
                self._device_columns[name].index_copy_(0, slots, values)

    def note_state(
        self,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int64],
        scores: NDArray[np.float32] | None,
        tags: NDArray[np.int64] | None,
    ) -> None:
        """Bring the host up to date with what strategies gave their rows when these had ``lengths`` tokens.

        A step that ran ahead arrives late: what a later one has left meanwhile stays.
        """
        latest = lengths >= self._noted_at[slots]
        self._noted_at[slots[latest]] = lengths[latest]
        for name, values in (("scores", scores), ("tags", tags)):
            if values is not None:
                self.columns[name][slots[latest]] = values[latest]

    def _keep_own_history(self, slot: int, *, keep: bool) -> None:
        own = self.token_ids[slot, : self.num_tokens[slot]].tolist() if keep else None
        self._keep_history(slot, own)

    def _keep_history(self, slot: int, history: list[int] | None) -> None:
        self.histories[slot] = history
        self.keeps_history[slot] = history is not None

    def _extend_histories(self, slots: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        kept = self.keeps_history[slots]
        if not kept.any():
            return
        for slot, row in zip(slots[kept].tolist(), tokens[kept].tolist(), strict=True):
            history = self.histories[slot]
            if history is not None:
                history.extend(token for token in row if token >= 0)

    def pack(self, scheduled: SchedulerOutput) -> PackedStep:
        """Lay the step's tokens end to end, on the host, and advance the slots' progress."""
        slots = self.slots_of(scheduled.seq_ids)
        counts = np.array(scheduled.num_new_tokens, dtype=np.int64)
        starts = self.num_computed[slots]
        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        rows = np.repeat(slots, counts)
        positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], counts)
        blocks = self.block_tables[rows, positions // self.block_size].astype(np.int64)
        places = blocks * self.block_size + positions % self.block_size
        self.num_computed[slots] += counts
        seq_lens = (starts + counts).astype(np.int32)
        most_blocks = -(-int(seq_lens.max()) // self.block_size)
        return PackedStep(
            slots=slots,
            counts=counts,
            starts=starts,
            sampling=np.array(scheduled.samples, dtype=np.bool_),
            drafted=np.maximum(self.num_computed[slots] - self.num_tokens[slots], 0),
            tokens=np.stack((self.token_ids[rows, positions], positions, places, rows)),
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=self.block_tables[slots, :most_blocks],
        )

    def input_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the ids of a step's tokens, int64 ``[num_tokens]``, with those filled in that the device alone knows.

        Args:
            tokens: ``PackedStep.tokens`` on the device.
        """
        return torch.where(tokens[0] < 0, self.last_tokens[tokens[3]], tokens[0])

    def gather_columns(self, slots: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the sampling parameters of these slots as device tensors ``[len(slots)]``, plus ``slots``."""
        if not self._device_tables:
            self._device_tables = [to_device(table.copy(), self.device) for table in self._tables]
            self._device_columns = _by_name(self._device_tables)
        elif self._changed:
            # No more than what changed: of the other slots the device may know more than the host.
            changed = np.fromiter(self._changed, dtype=np.int64)
            where = to_device(changed, self.device)
            for known, table in zip(self._device_tables, self._tables, strict=True):
                known.index_copy_(1, where, to_device(table[:, changed], self.device))
        self._changed.clear()
        index = to_device(slots, self.device)
        return _by_name([known.index_select(1, index) for known in self._device_tables]) | {"slots": index}

    def _claim(self, seq_id: int) -> int:
        slot = self._slots[seq_id] = self._free.pop()
        self._num_claims += 1
        self.claims[slot] = self._num_claims
        self._noted_at[slot] = 0
        self._changed.add(slot)
        self.version += 1
        return slot

    def _write_params(self, slot: int, request: Request, index: int, score: float, tag: int) -> None:
        params = request.params
        self.requests[slot] = request
        self.judges_prompt[slot] = params.prompt_logprobs is not None
        columns = self.columns
        columns["temperature"][slot] = params.temperature
        columns["top_k"][slot] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        columns["top_p"][slot] = params.top_p
        columns["min_p"][slot] = params.min_p
        columns["seeds"][slot] = request.seed
        columns["sequence_indices"][slot] = index
        columns["scores"][slot] = score
        columns["tags"][slot] = tag


def _by_name(tables: SequenceOf[Any]) -> dict[str, Any]:
    """Return the rows of an array or tensor for each type, by the names of the columns that they are."""
    named = zip(_COLUMNS.values(), tables, strict=True)
    return {name: column for names, table in named for name, column in zip(names, table, strict=True)}
