"""What a scheduler is, what it sees and what it returns."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.kv_cache.manager import KVCacheManager
    from folo_core.request import Request
    from folo_core.scheduling.queue import RequestQueue


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
    """Requests that hold no memory, ordered by the policy's ``order``."""
    running: list[Request] = attrs.field(factory=list)
    """Requests that hold memory, ordered by the policy's ``order``."""
    swapped: list[Request] = attrs.field(factory=list)
    """Requests whose keys and values lie in host memory."""

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

    The executor applies, in this order: ``forks``, ``released``, ``zero_blocks``, ``new_sequences``,
    ``new_blocks``, block copies; then it runs the tokens.
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
    copy_sources: list[int] = attrs.field(factory=list)
    copy_destinations: list[int] = attrs.field(factory=list)
    zero_blocks: list[int] = attrs.field(factory=list)
    """Blocks of failed requests: overwritten before anyone else owns them."""
    swap_out: list[tuple[int, int]] = attrs.field(factory=list)
    """(device block, host block) pairs to move; likewise ``swap_in`` as (host block, device block)."""
    swap_in: list[tuple[int, int]] = attrs.field(factory=list)
    scheduled: list[Request] = attrs.field(factory=list)
    """The requests these rows belong to, for the engine; executors in other processes do not get it."""
    preempted: list[Request] = attrs.field(factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(self.num_new_tokens)


@runtime_checkable
class Scheduler(Protocol):
    """A policy: who goes first, and who yields when memory runs out."""

    def order(self, request: Request) -> Any:  # noqa: ANN401 (any sortable key)
        """Return the key that sorts requests; the smallest runs first and yields last."""

    def schedule(self, state: SchedulerState, budget: StepBudget) -> SchedulerOutput:
        """Choose the next step. Use ``StepPlanner``, which keeps budgets and group atomicity."""
