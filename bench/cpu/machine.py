"""Whether this machine's cores are really there, before a run and during it.

On a shared machine two threads may be given one core, and a run then measures the neighbours. Before each run every
core hashes on its own at once, which is compared with what one core can do; during it, the time that other processes
took is read from the kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

ENOUGH = 0.85
"""Part of each core that must be there."""
FOREIGN = 0.1
"""Part of all cores that others may take during a run."""
TRIES = 6
PAUSE = 5.0
SPELL = "0.15"
"""Seconds that each core hashes."""


def cpus() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _rates(chosen: list[int]) -> list[float]:
    """Hash on these cores at once, each in a process of its own; return their rates."""
    command = [sys.executable, "-S", "-E", str(Path(__file__).with_name("busy.py"))]
    running = [subprocess.Popen([*command, str(cpu), SPELL], stdout=subprocess.PIPE, text=True) for cpu in chosen]
    return [float(process.communicate()[0]) for process in running]


@attrs.define
class Gate:
    """Lets a run begin when all cores are there, or after a bounded number of tries."""

    rates: Callable[[list[int]], list[float]] = _rates
    pause: Callable[[float], None] = time.sleep
    cpus: list[int] = attrs.field(factory=cpus)
    tries: int = TRIES
    best: float = 0.0
    """The fastest that any core has been so far: what a core is when nobody else is on it."""

    def cores(self) -> float:
        """Measure what part of its full speed the slowest core has now."""
        found = self.rates(self.cpus)
        self.best = max([self.best, *found])
        return min(found) / self.best

    def wait(self) -> float:
        """Wait until the cores are there; return the last measurement, too low if they never were."""
        if not self.best:
            self.best = max(rate for _ in range(3) for rate in self.rates(self.cpus[:1]))
        found = self.cores()
        for _ in range(self.tries - 1):
            if found >= ENOUGH:
                break
            self.pause(PAUSE)
            found = self.cores()
        return found


@attrs.frozen
class CpuTime:
    """Seconds that all processes, and one with its descendants, have used, and that there were."""

    busy: float
    own: float
    wall: float
    cores: int

    def foreign_until(self, later: CpuTime) -> float:
        """Return the part of all cores' time that others took until ``later``."""
        others = (later.busy - self.busy) - (later.own - self.own)
        return max(0.0, others / ((later.wall - self.wall) * self.cores))


def cpu_time(pid: int) -> CpuTime | None:
    """Read what has been used so far; None where the kernel does not tell."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, soft, steal = fields[:8]
        busy = (user + nice + system + irq + soft + steal) / tick
        own = sum(_used(member) for member in _family(pid)) / tick
    except (OSError, ValueError):
        return None
    return CpuTime(busy, own, time.perf_counter(), os.cpu_count() or 1)


def _used(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))  # its own and its finished children's, user and system


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for member in found:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            found += map(int, children.read_text(encoding="ascii").split())
    return found
