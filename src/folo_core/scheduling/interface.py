"""What a scheduler is, what it sees and what it returns."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from folo_core.scheduling.costs import PreemptionCosts
from folo_core.scheduling.queue import RequestQueue
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.kv_cache.manager import KVCacheManager
    from folo_core.request import Request


@attrs.frozen(slots=True, kw_only=True)
class StepBudget:
    """The most that one step may hold."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_chunk_tokens: int
    """Most prompt tokens of one sequence in one step (``long_prefill_token_threshold``)."""
    chunked_prefill: bool = True
    """False: a prompt is computed in one step or not at all."""


@attrs.define(slots=True, kw_only=True)
class SchedulerState:
    """All unfinished requests, and the memory they share."""

    kv: KVCacheManager
    waiting: RequestQueue
    """Requests that hold no memory on the device, ordered by the policy's ``order``. The keys and values of those that
    were swapped out lie on the host (``request.is_swapped``)."""
    running: list[Request] = attrs.field(factory=list)
    """Requests that hold memory, ordered by the policy's ``order``."""
    costs: PreemptionCosts = attrs.field(factory=PreemptionCosts)
    """Whether a preempted request is cheaper to move to the host and back, or to compute anew."""

    @classmethod
    def empty(
        cls, kv: KVCacheManager, order: Callable[[Request], Any], costs: PreemptionCosts | None = None
    ) -> SchedulerState:
        """Return the state of an engine without requests, whose queues follow ``order``."""
        costs = PreemptionCosts() if costs is None else costs
        return cls(kv=kv, waiting=RequestQueue(order), costs=costs)

    @property
    def is_idle(self) -> bool:
        """Whether there is no unfinished request."""
        return not (self.waiting or self.running)

    @property
    def num_swapped(self) -> int:
        """Waiting requests whose keys and values lie on the host."""
        return sum(request.is_swapped for request in self.waiting)

    def requeue(self, request: Request) -> None:
        """Take a running or swapped request's memory, on the device or on the host, and queue it again."""
        if self.waiting.remove(request.request_id) is None:
            self.running.remove(request)
        for sequence in request.live:
            self.kv.release(sequence)
            sequence.draft_token_ids.clear()
            sequence.transition(SequenceStatus.WAITING)
        self.waiting.push(request)

    def start(self, request: Request, order: Callable[[Request], Any]) -> None:
        """Put a request among the running ones, in the policy's order."""
        bisect.insort(self.running, request, key=order)

    @property
    def num_running_seqs(self) -> int:
        """Sequences that the running requests may grow to: their widths, so that a fan-out always finds room."""
        return sum(request.width for request in self.running)


@attrs.frozen(slots=True)
class NewSequence:
    """A sequence that the executor has not seen, or has forgotten after a preemption."""

    seq_id: int
    request_id: str
    index: int
    token_ids: list[int]
    """All tokens so far, prompt and output."""
    num_computed: int = 0
    """Leading tokens whose keys and values its blocks already hold."""
    score: float = 0.0
    tag: int = 0


@attrs.frozen(slots=True)
class Fork:
    """A sequence that starts as a copy of another one's first ``num_tokens`` tokens and goes on with ``tail``."""

    parent_id: int
    child_id: int
    request_id: str
    index: int
    num_tokens: int
    tail: list[int]
    num_computed: int
    blocks: list[int]
    score: float = 0.0
    tag: int = 0


@attrs.define(slots=True)
class SchedulerOutput:
    """One step, as parallel lists with an entry per scheduled sequence, and what the executor must do first.

    The executor applies, in this order: ``forks``, ``released``, ``swap_out``, ``zero_blocks``, ``swap_in``,
    ``new_sequences``, ``new_blocks``, block copies; then it runs the tokens.
    """

    seq_ids: list[int] = attrs.field(factory=list)
    """Scheduled sequences; those of one request adjacent, in row order."""
    num_new_tokens: list[int] = attrs.field(factory=list)
    """Tokens of each to run in this step, drafted ones included."""
    samples: list[bool] = attrs.field(factory=list)
    """Whether each reaches its newest token, so that the next one is sampled. Tokens past it are drafts."""
    new_sequences: list[NewSequence] = attrs.field(factory=list)
    forks: list[Fork] = attrs.field(factory=list)
    released: list[int] = attrs.field(factory=list)
    """Sequences that ended or were preempted since the last step."""
    new_blocks: dict[int, tuple[int, list[int]]] = attrs.field(factory=dict)
    """Sequence id to (first changed entry of its block table, blocks from there on)."""
    reparented: list[str] = attrs.field(factory=list)
    """Requests whose sequences the step may make continue one another, before the host knows."""
    unseen: list[str] = attrs.field(factory=list)
    """Those of them of which the same is true of the step before, so that the tables here are from before that one."""
    spares: dict[int, int] = attrs.field(factory=dict)
    """Sequence id to the block that it writes to if it turns out to continue another one (see ``Regrouping``)."""
    copy_sources: list[int] = attrs.field(factory=list)
    copy_destinations: list[int] = attrs.field(factory=list)
    zero_blocks: list[int] = attrs.field(factory=list)
    """Blocks of failed requests: overwritten before anyone else owns them."""
    swap_out: list[tuple[int, int]] = attrs.field(factory=list)
    """(device block, host block) pairs to copy; likewise ``swap_in`` as (host block, device block)."""
    swap_in: list[tuple[int, int]] = attrs.field(factory=list)
    scheduled: list[Request] = attrs.field(factory=list)
    """The requests these rows belong to, for the engine; executors in other processes do not get it."""
    tokens_of_scheduled: list[int] = attrs.field(factory=list)
    """How many tokens each of them runs."""
    preempted: list[Request] = attrs.field(factory=list)
    """Requests that left in this step: to be computed anew, or, if their sequences are SWAPPED, to come back."""
    admitted: list[Request] = attrs.field(factory=list)
    """Requests that left the queue in this step."""
    resumed: list[Request] = attrs.field(factory=list)
    """Requests that came back from the host in this step."""

    @property
    def is_empty(self) -> bool:
        """Whether the executor has nothing to do."""
        work = (self.seq_ids, self.forks, self.released, self.zero_blocks, self.swap_out, self.swap_in)
        return not any(work)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(self.num_new_tokens)

    def tokens_by_request(self) -> dict[str, int]:
        """Return the tokens that the step runs, by request id."""
        ids = (request.request_id for request in self.scheduled)
        return dict(zip(ids, self.tokens_of_scheduled, strict=True))


@runtime_checkable
class Scheduler(Protocol):
    """A policy: who goes first, and who yields when memory runs out."""

    def order(self, request: Request) -> Any:  # noqa: ANN401 (any sortable key)
        """Return the key that sorts requests; the smallest runs first and yields last."""

    def schedule(self, state: SchedulerState, budget: StepBudget) -> SchedulerOutput:
        """Choose the next step. Use ``StepPlanner``, which keeps budgets and group atomicity."""


@runtime_checkable
class ServiceScheduler(Scheduler, Protocol):
    """A policy that is told what its choices came to: for fairness, deadlines and the like."""

    def on_tokens(self, request: Request, num_tokens: int) -> None:
        """Take note that a step gave the sequences of a request so many new tokens."""
