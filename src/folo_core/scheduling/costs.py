"""What a preemption costs: computing a request's tokens anew, against copying its blocks to the host and back."""

from __future__ import annotations

import attrs

_FORGETTING = 0.99
"""Weight of what was measured before, at each new measurement."""


@attrs.define(slots=True)
class PreemptionCosts:
    """Learns both costs from the steps that run. Which way is taken changes how long a request takes, and no result."""

    mode: str = "auto"
    """``auto`` takes the cheaper way, ``recompute`` and ``swap`` that one; without room on the host all recompute."""
    seconds_per_block: float = 1e-3
    """Of copying one block one way; a guess until the first swap."""
    _seconds: float = 0.0
    _tokens: float = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Of computing one token among many; 0 before the first step."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step, which counts by its tokens twice over: recomputations are large steps."""
        self._seconds = self._seconds * _FORGETTING + seconds * num_tokens
        self._tokens = self._tokens * _FORGETTING + num_tokens * num_tokens

    def observe_swap(self, num_blocks: int, seconds: float) -> None:
        """Learn from block copies."""
        if num_blocks:
            self.seconds_per_block += (seconds / num_blocks - self.seconds_per_block) * 0.2

    def prefers_swap(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether moving ``num_blocks`` there and back is cheaper than computing ``num_tokens`` anew."""
        if self.mode != "auto":
            return self.mode == "swap"
        return 2 * num_blocks * self.seconds_per_block < num_tokens * self.seconds_per_token
