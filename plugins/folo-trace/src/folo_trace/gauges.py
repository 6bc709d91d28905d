"""What an engine does, in figures: now, lately, and so far."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import attrs

from folo_core.engine.observer import RequestEvent
from folo_trace.lives import FINISHED, PREEMPTED, PREFILL, QUEUED, RUNNING, SWAPPED, Life

if TYPE_CHECKING:
    from folo_core.engine.observer import RequestRecord, StepRecord

WINDOW_S = 2.0
"""How far back "lately" reaches, in seconds; at least one step is in it."""


@attrs.frozen(slots=True)
class _Recent:
    """One step, for rates."""

    started: float
    ended: float
    prefill_tokens: int
    sampled_tokens: int


class Gauges:
    """Follows one engine's steps and requests."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        """Unfinished requests, in order of arrival."""
        self.finished: Counter[str] = Counter()
        """Ended requests, by finish reason."""
        self._ending: dict[str, Life] = {}
        """Those that have ended in the step that has not come back yet."""
        self.num_steps = self.num_preemptions = self.num_swaps = 0
        self.prefill_tokens = self.sampled_tokens = 0
        self.swapped_out_blocks = self.swapped_in_blocks = 0
        self.peak_blocks = 0
        self.last: StepRecord | None = None
        self._began: float | None = None
        self._ended = 0.0
        self._recent: deque[_Recent] = deque()

    def on_request(self, record: RequestRecord) -> None:
        """Take note of an event of a request."""
        self._began = record.time if self._began is None else self._began
        self._ended = max(self._ended, record.time)
        life = self.lives.get(record.request_id)
        if life is None:
            life = self.lives[record.request_id] = Life.begin(record)
        before = life.num_preemptions
        life.follow(record)
        self.num_preemptions += life.num_preemptions - before
        self.num_swaps += record.event is RequestEvent.SWAPPED_OUT
        if life.state == FINISHED:
            self.finished[life.finish_reason or "error"] += 1
            self._ending[record.request_id] = self.lives.pop(record.request_id)

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step."""
        self.last = record
        ended = record.started + record.seconds
        self._began = record.started if self._began is None else self._began
        self._ended = max(self._ended, ended)
        prefill = sum(tokens for name, tokens in record.tokens_of.items() if self._is_prefill(name, record))
        self._ending.clear()
        self.num_steps += 1
        self.prefill_tokens += prefill
        self.sampled_tokens += record.num_sampled
        self.swapped_out_blocks += record.swapped_out_blocks
        self.swapped_in_blocks += record.swapped_in_blocks
        self.peak_blocks = max(self.peak_blocks, record.total_blocks - record.free_blocks - record.cached_blocks)
        self._recent.append(_Recent(record.started, ended, prefill, record.num_sampled))
        while self._recent[0].ended < ended - WINDOW_S:
            self._recent.popleft()

    def _is_prefill(self, request_id: str, record: StepRecord) -> bool:
        life = self.lives.get(request_id) or self._ending.get(request_id)
        return life is not None and life.ran(record) == PREFILL

    def seconds(self) -> float:
        """Return how long the run has been going on, up to what was last heard of it."""
        return 0.0 if self._began is None else self._ended - self._began

    def rates(self) -> dict[str, float]:
        """Return steps, prefilled tokens and generated tokens per second, lately."""
        recent = self._recent
        seconds = recent[-1].ended - recent[0].started if recent else 0.0
        return _per_second(
            seconds,
            steps=len(recent),
            prefill_tokens=sum(step.prefill_tokens for step in recent),
            decode_tokens=sum(step.sampled_tokens for step in recent),
        )

    def figures(self) -> dict[str, Any]:
        """Return the present state as plain data; the README describes the fields."""
        states = Counter(life.state for life in self.lives.values())
        return {
            "seconds": round(self.seconds(), 3),
            "num_steps": self.num_steps,
            "per_second": self.rates(),
            "num_running": states[RUNNING],
            "num_waiting": states[QUEUED] + states[PREEMPTED] + states[SWAPPED],
            "num_swapped": states[SWAPPED],
            **self._counts(),
            **self._memory(),
            "requests": [_row(life) for life in self.lives.values() if life.state != QUEUED],
        }

    def summary(self) -> dict[str, Any]:
        """Return what the whole run came to."""
        seconds = self.seconds()
        return {
            "seconds": round(seconds, 3),
            "num_steps": self.num_steps,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.sampled_tokens,
            "per_second": _per_second(
                seconds,
                steps=self.num_steps,
                prefill_tokens=self.prefill_tokens,
                decode_tokens=self.sampled_tokens,
            ),
            **self._counts(),
            "peak_blocks": self.peak_blocks,
            **self._memory(),
        }

    def _counts(self) -> dict[str, Any]:
        return {
            "finished": dict(self.finished),
            "num_preemptions": self.num_preemptions,
            "num_swaps": self.num_swaps,
            "swapped_out_blocks": self.swapped_out_blocks,
            "swapped_in_blocks": self.swapped_in_blocks,
        }

    def _memory(self) -> dict[str, Any]:
        """Return the memory as the last step left it; nothing before the first."""
        last = self.last
        if last is None:
            return {}
        used = last.total_blocks - last.free_blocks - last.cached_blocks
        blocks = {"used": used, "cached": last.cached_blocks, "free": last.free_blocks, "total": last.total_blocks}
        rate = last.hit_tokens / last.queried_tokens if last.queried_tokens else 0.0
        return {
            "block_bytes": last.block_bytes,
            "blocks": blocks,
            "host_blocks": {"used": last.used_host_blocks, "total": last.total_host_blocks},
            "prefix_cache": {
                "queried_tokens": last.queried_tokens,
                "hit_tokens": last.hit_tokens,
                "hit_rate": round(rate, 4),
            },
        }


def _per_second(seconds: float, **counts: int) -> dict[str, float]:
    return {name: round(count / seconds, 2) if seconds > 0 else 0.0 for name, count in counts.items()}


def _row(life: Life) -> dict[str, Any]:
    return {
        "id": life.request_id,
        "tenant": life.tenant,
        "state": life.state,
        "prompt_tokens": life.num_prompt_tokens,
        "output_tokens": life.num_output_tokens,
        "preemptions": life.num_preemptions,
        "swaps": life.num_swaps,
    }
