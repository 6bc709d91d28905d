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
    num_preempted: int
    num_waiting: int
    num_running: int
    free_blocks: int
    total_blocks: int
    seconds: float
    """Wall time of the whole step."""


@runtime_checkable
class Observer(Protocol):
    """Watches steps. Called once a step with plain numbers; an observer that raises is dropped with a warning."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a finished step."""
