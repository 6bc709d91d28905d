"""How the benchmarks here measure: many repeats, their median, and the best, which a busy machine disturbs least."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def measure(work: Callable[[], object], *, calls: int, repeats: int = 15) -> tuple[float, float]:
    """Time ``work``.

    Returns:
        Median and least seconds of one call over ``repeats`` runs of ``calls`` calls.
    """
    work()
    gc.collect()
    gc.disable()
    try:
        samples = [_one_run(work, calls) for _ in range(repeats)]
    finally:
        gc.enable()
    return statistics.median(samples), min(samples)


def _one_run(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def show(name: str, median: float, best: float, note: str = "") -> None:
    """Print one line; arguments in seconds."""
    print(f"{name:<50} median {median * 1e6:>9.2f} us   best {best * 1e6:>9.2f} us   {note}".rstrip())
