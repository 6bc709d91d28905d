"""What an observer is told after each step."""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)


@attrs.frozen(slots=True, kw_only=True)
class StepRecord:
    """One step in numbers."""

    step: int
    num_seqs: int
    """Sequences that ran."""
    num_tokens: int
    """Tokens that ran."""
    num_sampled: int
    """Tokens that were appended."""
    num_draft_tokens: int = 0
    """Drafted tokens that were judged."""
    num_accepted_tokens: int = 0
    """Those of them that were kept."""
    num_preempted: int
    """Requests that left for want of memory or for one more urgent, those swapped out included."""
    num_waiting: int
    num_running: int
    num_swapped: int = 0
    """Requests whose keys and values lie on the host."""
    free_blocks: int
    """Blocks that nobody references and that hold nothing of use."""
    cached_blocks: int = 0
    """Blocks that nobody references, kept for what they hold."""
    total_blocks: int
    block_bytes: int = 0
    """Bytes of a block's keys and values over all layers; 0 if nobody said."""
    used_host_blocks: int = 0
    total_host_blocks: int = 0
    swapped_out_blocks: int = 0
    """Blocks that this step copied to the host, and ``swapped_in_blocks`` those that it copied back."""
    swapped_in_blocks: int = 0
    queried_tokens: int = 0
    """Tokens of all requests admitted so far, and ``hit_tokens`` those of them that were found in the cache."""
    hit_tokens: int = 0
    tokens_of: dict[str, int] = attrs.field(factory=dict)
    """Tokens that each request ran in this step, by request id."""
    sampled_of: dict[str, int] = attrs.field(factory=dict)
    """Tokens that were appended to the longest-grown row of each request that sampled, by request id."""
    started: float = 0.0
    """When the step began, in seconds of ``time.perf_counter``."""
    seconds: float
    """Wall time of the whole step."""


@attrs.frozen(slots=True, kw_only=True)
class BranchRecord:
    """What one step did to one request's sequences. Sequences are named by their ids; a fork gets a new one."""

    step: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    parents: list[int]
    """For each row after the step, the sequence it continues."""
    rows: list[int]
    """The row's own sequence: its parent's, or a fork of it."""
    tokens: list[list[int]]
    """What each row appended, up to the token that ended it."""
    logprobs: list[list[float]] | None
    """Log probabilities of these tokens, if the strategy states them; empty for a row that kept drafts."""
    scores: list[float]
    """What the strategy ranks each row by."""
    ended: dict[int, str]
    """Rows that ended in this step, and why (a finish reason)."""
    pruned: list[int]
    """Sequences that no row continues."""
    blocks: dict[int, list[int]]
    """KV blocks of each row that goes on; one that several name is shared."""


class RequestEvent(enum.Enum):
    """What may happen to a request between its arrival and its end."""

    QUEUED = "queued"
    STARTED = "started"
    """It was scheduled, for the first time or after a preemption that dropped what it had computed."""
    PREEMPTED = "preempted"
    """It lost its memory and waits to be computed anew."""
    SWAPPED_OUT = "swapped out"
    """Its keys and values moved to the host."""
    SWAPPED_IN = "swapped in"
    FINISHED = "finished"


@attrs.frozen(slots=True, kw_only=True)
class RequestRecord:
    """One event of one request."""

    time: float
    """Seconds of ``time.perf_counter``."""
    step: int
    request_id: str
    event: RequestEvent
    tenant: str
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    """Of its longest sequence."""
    num_sequences: int
    """Live ones; ended ones where the request has finished."""
    num_blocks: int = 0
    """Blocks that they take up, on the device or on the host; one that several share counts once."""
    finish_reason: str | None = None


@runtime_checkable
class Observer(Protocol):
    """Watches steps. Called once a step with plain numbers; an observer that raises is dropped with a warning."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a finished step."""


@runtime_checkable
class BranchObserver(Observer, Protocol):
    """An observer that also follows what strategies do to sequences. Nothing is recorded unless one is there."""

    def on_branches(self, record: BranchRecord) -> None:
        """Take note of one request's rows after a step."""


@runtime_checkable
class RequestObserver(Observer, Protocol):
    """An observer that also follows requests from their arrival to their end."""

    def on_request(self, record: RequestRecord) -> None:
        """Take note of an event of one request."""


class Observers:
    """An engine's observers. One that raises is dropped, so that watching never stops what is watched."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.all = list(observers)
        self.of_branches = [observer for observer in self.all if isinstance(observer, BranchObserver)]
        self.of_requests = [observer for observer in self.all if isinstance(observer, RequestObserver)]

    def on_step(self, record: StepRecord) -> None:
        """Tell all of a finished step."""
        for observer in self.all.copy():
            self._tell(observer, observer.on_step, record)

    def on_branches(self, record: BranchRecord) -> None:
        """Tell those who follow them what became of a request's rows."""
        for observer in self.of_branches.copy():
            self._tell(observer, observer.on_branches, record)

    def on_request(self, record: RequestRecord) -> None:
        """Tell those who follow requests of an event."""
        for observer in self.of_requests.copy():
            self._tell(observer, observer.on_request, record)

    def _tell(self, observer: Observer, hear: Callable[[Any], None], record: object) -> None:
        try:
            hear(record)
        except Exception:
            logger.exception("observer %r raised and is dropped", observer)
            self.all.remove(observer)
            self.of_branches = [kept for kept in self.of_branches if kept is not observer]
            self.of_requests = [kept for kept in self.of_requests if kept is not observer]
