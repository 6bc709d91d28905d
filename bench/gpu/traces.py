"""A profile of some steps, and how much of the time the device had nothing to do."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of what a device does, in a trace of torch's profiler."""


@attrs.frozen(kw_only=True)
class Idleness:
    """What a trace says of the device."""

    span: float
    """Seconds from the start of the first kernel to the end of the last."""
    busy: float
    """Seconds of them in which at least one kernel or copy ran."""
    late_idle: float
    """Idle share of the second half of the span, in which most prompts have been read and steps decode."""
    kernels: int
    costliest: list[tuple[str, float]]
    """Names of the kernels that took longest, with their seconds."""

    @property
    def idle(self) -> float:
        """Share of the span in which the device did nothing."""
        return 1 - self.busy / self.span if self.span else 0.0


def record(work: Callable[[], object], file: Path) -> Idleness | None:
    """Profile a call, write its trace, and say how idle the device was; None if it ran nothing on a device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    return idleness(read_events(file))


def read_events(file: Path) -> list[dict[str, Any]]:
    """Return the events of a trace, packed or not."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as stream:
        events: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    return events


def idleness(events: list[dict[str, Any]]) -> Idleness | None:
    """Add up the intervals in which the device worked; None if there are none. Times in a trace are microseconds."""
    work = [event for event in events if event.get("cat") in DEVICE and "dur" in event]
    if not work:
        return None
    intervals = sorted((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in work)
    start, end = intervals[0][0], max(stop for _, stop in intervals)
    middle = (start + end) / 2
    costs: dict[str, float] = {}
    for event in work:
        name = str(event.get("name", "?"))
        costs[name] = costs.get(name, 0.0) + event["dur"] / 1e6
    late = end - middle
    return Idleness(
        span=end - start,
        busy=_covered(intervals, start),
        late_idle=1 - _covered(intervals, middle) / late if late else 0.0,
        kernels=len(work),
        costliest=sorted(costs.items(), key=lambda item: -item[1])[:8],
    )


def _covered(intervals: list[tuple[float, float]], start: float) -> float:
    """Seconds from ``start`` on that at least one of the sorted intervals covers."""
    covered, reached = 0.0, start
    for begin, end in intervals:
        if end > reached:
            covered += end - max(begin, reached)
            reached = end
    return covered


def show(found: Idleness | None) -> str:
    """Return the lines that are printed."""
    if found is None:
        return "profile: nothing ran on a device"
    head = (
        f"profile: {found.kernels} kernels in {found.span * 1e3:.1f} ms; the device was idle {found.idle:.1%} of them, "
        f"{found.late_idle:.1%} of the second half"
    )
    return "\n".join([head, *(f"  {seconds * 1e3:8.2f} ms  {name[:100]}" for name, seconds in found.costliest)])
