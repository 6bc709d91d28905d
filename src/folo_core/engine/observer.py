"""What an observer is told after each step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs


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
    num_waiting: int
    num_running: int
    free_blocks: int
    total_blocks: int
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
