"""Spans around the stages of an engine's step, for the benchmarks here: each second counted once."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.engine.engine import Engine

STAGES = ("scheduling", "packing", "attention plan", "forward", "sampling", "output processing", "rest of the step")


class Stages:
    """Times the stages of one engine's steps, by wrapping the methods that are called once a step.

    A stage's seconds are its own: what a stage inside it takes is that stage's.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        runner: Any = engine.executor.runner
        self.seconds: Counter[str] = Counter()
        self.spans: list[tuple[str, float, float]] = []
        """(stage, begin, end) of every call by the clock, if ``keep_spans``."""
        self.keep_spans = False
        self._inside: list[float] = []
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._wrap(engine, "step", "rest of the step")
        self._wrap(engine, "_schedule", "scheduling")
        self._wrap(engine, "_update", "output processing")
        self._wrap(runner, "run", "packing")
        self._wrap(runner.backend, "plan", "attention plan")
        self._wrap(runner.model, "forward", "forward")
        self._wrap(runner.stage, "run", "sampling")

    def clear(self) -> None:
        """Start counting anew."""
        self.seconds.clear()
        self.spans.clear()

    def close(self) -> None:
        """Take the wrappers off."""
        for owner, method, own in self._wrapped:
            if own is None:
                delattr(owner, method)
            else:
                setattr(owner, method, own)

    def _wrap(self, owner: Any, method: str, stage: str) -> None:  # noqa: ANN401 (any part of an engine)
        call = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            self._inside.append(0.0)
            begin = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                end = self._clock()
                self.seconds[stage] += end - begin - self._inside.pop()
                if self._inside:
                    self._inside[-1] += end - begin
                if self.keep_spans:
                    self.spans.append((stage, begin, end))

        self._wrapped.append((owner, method, vars(owner).get(method)))
        setattr(owner, method, timed)
