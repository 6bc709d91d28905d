"""One token stream and its progress: SequenceData is the pure data, Sequence the mutable bookkeeping around it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Self

import attrs

from folo_core.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from folo_core.engine.detokenizer import Detokenizer
    from folo_core.kv_cache.block_table import BlockTable
    from folo_core.outputs import TokenLogprobs


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life. ``TRANSITIONS`` lists the moves that exist."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"

    @property
    def is_finished(self) -> bool:
        """Whether no further transition exists."""
        return self in FINISHED

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length``, ``abort`` or ``error``; None while unfinished."""
        return self.value if self in FINISHED else None


FINISHED = frozenset(
    {
        SequenceStatus.FINISHED_STOPPED,
        SequenceStatus.FINISHED_LENGTH_CAPPED,
        SequenceStatus.FINISHED_ABORTED,
        SequenceStatus.FINISHED_ERROR,
    }
)

_BROKEN_OFF = frozenset({SequenceStatus.FINISHED_ABORTED, SequenceStatus.FINISHED_ERROR})

TRANSITIONS: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING}) | _BROKEN_OFF,
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.SWAPPED}) | FINISHED,
    SequenceStatus.SWAPPED: frozenset({SequenceStatus.RUNNING, SequenceStatus.WAITING}) | _BROKEN_OFF,
    **dict.fromkeys(FINISHED, frozenset()),
}


def _as_tuple(token_ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(token_ids)


@attrs.define(slots=True, on_setattr=attrs.setters.NO_OP)  # a fork sets each, and the prompt is a tuple by then
class SequenceData:
    """Token ids and their cumulative log probability: pure data, serialisable.

    The prompt is an immutable tuple that forks share; the output is a list that each fork owns,
    so appending is amortised O(1) and a fork's changes never reach its parent.
    """

    prompt_token_ids: tuple[int, ...] = attrs.field(converter=_as_tuple)
    output_token_ids: list[int] = attrs.field(factory=list)
    cumulative_logprob: float | None = None
    """Sum of the model's log probabilities of the output tokens; None when the request did not ask for them."""
    _token_ids: list[int] | None = attrs.field(default=None, init=False, repr=False, eq=False)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_token_id(self) -> int:
        """The newest token, which is the next decode step's input."""
        return self.output_token_ids[-1] if self.output_token_ids else self.prompt_token_ids[-1]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output in one list, built on first use and then kept up to date. Not to be written."""
        if self._token_ids is None:
            self._token_ids = [*self.prompt_token_ids, *self.output_token_ids]
        return self._token_ids

    def append(self, token_id: int, logprob: float | None = None) -> None:
        """Add one output token and, if given, its log probability."""
        self.output_token_ids.append(token_id)
        if self._token_ids is not None:
            self._token_ids.append(token_id)
        if logprob is not None:
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprob

    def fork(self) -> SequenceData:
        """Return an independent copy that shares only the immutable prompt."""
        child = SequenceData.__new__(SequenceData)
        child.prompt_token_ids = self.prompt_token_ids
        child.output_token_ids = self.output_token_ids.copy()
        child.cumulative_logprob = self.cumulative_logprob
        child._token_ids = None  # noqa: SLF001 (its own class)
        return child

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON."""
        return {
            "prompt_token_ids": list(self.prompt_token_ids),
            "output_token_ids": list(self.output_token_ids),
            "cumulative_logprob": self.cumulative_logprob,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild what ``to_dict`` wrote."""
        return cls(data["prompt_token_ids"], list(data["output_token_ids"]), data["cumulative_logprob"])


@attrs.define(slots=True, eq=False, kw_only=True)
class Sequence:
    """One candidate of a request. The scheduler moves it, the block table holds its keys and values."""

    seq_id: int
    """Unique within the engine."""
    index: int
    """Position among all sequences that the request ever had; part of the random key."""
    data: SequenceData
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache: progress, not cache hits."""
    num_cached_tokens: int = 0
    """Tokens that a prefix-cache hit spared."""
    num_indexed_blocks: int = 0
    """Leading blocks of its table that the prefix cache has been told of."""
    block_digests: list[bytes] = attrs.field(factory=lambda: [b""], repr=False)
    """What the prefix cache knows its full blocks by, as far as somebody asked; before them the root of its tenant."""
    block_table: BlockTable | None = None
    spare_block: int | None = None
    """A block beside its table, to write to if it turns out to continue another sequence (see ``Regrouping``)."""
    host_blocks: list[int] = attrs.field(factory=list)
    """Where its blocks lie on the host while it is swapped out."""
    detokenizer: Detokenizer | None = None
    logprobs: list[TokenLogprobs] | None = None
    """Per output token, when the request asked for log probabilities."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the sequence; None for EOS, length, abort and error."""
    score: float = 0.0
    """What its strategy ranks it by; a fork starts with its parent's."""
    tag: int = 0
    """The number by which its strategy knows it."""
    draft_token_ids: list[int] = attrs.field(factory=list)
    """Guesses at its next tokens, to be computed and judged in the next step."""
    num_pending: int = 0
    """Tokens that steps in flight sample for it: the device knows them, and runs on from them; the host does not yet.
    What was scheduled counts them as if they were there (``num_ahead``)."""

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens."""
        return self.data.num_tokens

    @property
    def num_ahead(self) -> int:
        """Number of tokens that the device knows: prompt, output, and what steps in flight have sampled."""
        return self.data.num_tokens + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that still have to pass through the model; 1 while decoding."""
        return self.num_ahead - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has reached a final status."""
        return self.status.is_finished

    def transition(self, status: SequenceStatus) -> None:
        """Move to ``status``.

        Raises:
            IllegalTransitionError: the state machine has no such move.
        """
        if status not in TRANSITIONS[self.status]:
            allowed = ", ".join(sorted(s.name for s in TRANSITIONS[self.status])) or "none: it is final"
            message = f"sequence {self.seq_id}: {self.status.name} -> {status.name} is no move; allowed: {allowed}"
            raise IllegalTransitionError(message)
        self.status = status

    def add_token_id(self, token_id: int, logprob: float | None = None) -> None:
        """Append a generated token."""
        self.data.append(token_id, logprob)

    def continue_from(self, past: Sequence) -> None:
        """Take over the tokens, text and standing of a fork that was made for it. Its own memory stays."""
        self.data, self.detokenizer, self.logprobs = past.data, past.detokenizer, past.logprobs
        self.block_digests, self.num_indexed_blocks = past.block_digests, past.num_indexed_blocks
        self.num_cached_tokens, self.score, self.tag = past.num_cached_tokens, past.score, past.tag

    def fork(self, *, seq_id: int, index: int, with_memory: bool = True) -> Sequence:
        """Return a child that continues from here on its own.

        Keys and values stay shared block by block until one side writes, or ``with_memory`` is false and it has none;
        everything else is copied, except the prompt, which is immutable.
        """
        return Sequence(
            seq_id=seq_id,
            index=index,
            data=self.data.fork(),
            status=self.status,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_indexed_blocks=self.num_indexed_blocks,
            block_digests=self.block_digests.copy(),
            block_table=self.block_table.fork() if with_memory and self.block_table is not None else None,
            detokenizer=None if self.detokenizer is None else self.detokenizer.fork(),
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            score=self.score,
            tag=self.tag,
        )


def create_sequences(prompts: Iterable[tuple[int, ...]], *, first_id: int = 0) -> list[Sequence]:
    """Return one waiting sequence per prompt, with consecutive ids from ``first_id``."""
    return [
        Sequence(seq_id=seq_id, index=0, data=SequenceData(prompt)) for seq_id, prompt in enumerate(prompts, first_id)
    ]
