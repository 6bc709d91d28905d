"""How many threads to run on, and whether to bind them to processors: measured, not assumed.

Two unbound threads may share one processor while another idles, and then a small product takes many times as long;
bound threads may be bound to a processor that somebody else is using. Half of the threads may be as fast as all, where
two of them share a core's units. So candidates are timed in turns on a product like those of a decoding step.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING

import attrs
import torch

from folo_kernels import library as native
from folo_kernels.matrix import PackedMatrix, Plain

if TYPE_CHECKING:
    from folo_kernels.library import Library

ROWS, FEATURES = 8, 512
"""Of the product that is timed: about 0.1 ms on two cores."""

ROUNDS = 15

CLEARLY = {True: 0.9, False: 0.75}
"""A candidate must take less than this share of the best time so far: with as many threads as the best one, and with
fewer. What is busy at this moment may be idle for the rest of the engine's life, so the balance is towards more."""


@attrs.frozen(slots=True)
class Team:
    """A number of threads, and the processors they are bound to, if any."""

    threads: int
    cpus: tuple[int, ...] = ()

    def __str__(self) -> str:
        """``2 threads, bound to 0 and 1``."""
        bound = f", bound to {' and '.join(map(str, self.cpus))}" if self.cpus else ", not bound"
        return f"{self.threads} threads{bound}" if self.threads > 1 else "1 thread"


def candidates(threads: int, cpus: tuple[int, ...], *, may_bind: bool) -> list[Team]:
    """Return what to try, the best guess first."""
    if threads <= 1:
        return [Team(1)]
    counts = [threads, threads // 2] if threads > 2 else [threads]  # noqa: PLR2004 (half of two is tried as one)
    bound = [Team(count, cpus[:count]) for count in counts if may_bind and len(cpus) >= count]
    return [*bound, *(Team(count) for count in counts), Team(1)]


def fastest(teams: list[Team], seconds: dict[Team, list[float]]) -> Team:
    """Return the team whose lower quartile of times is lowest; one later in the list must be clearly faster."""
    typical = {team: statistics.quantiles(times)[0] for team, times in seconds.items()}
    best = teams[0]
    for team in teams[1:]:
        if typical[team] < CLEARLY[team.threads >= best.threads] * typical[best]:
            best = team
    return best


def settle(library: Library) -> Team:
    """Time the candidates, use the fastest from now on and return it. Takes some milliseconds.

    Threads that the user has bound (``OMP_PROC_BIND``, ``GOMP_CPU_AFFINITY``) are left where they are.
    """
    may_bind = hasattr(os, "sched_getaffinity") and not {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY"} & os.environ.keys()
    cpus = tuple(sorted(os.sched_getaffinity(0))) if may_bind else ()
    teams = candidates(torch.get_num_threads(), cpus, may_bind=may_bind)
    team = fastest(teams, _time(library, teams)) if len(teams) > 1 else teams[0]
    native.use_threads(library, team.threads, team.cpus)
    return team


def _time(library: Library, teams: list[Team]) -> dict[Team, list[float]]:
    matrix = PackedMatrix([Plain(torch.ones(4 * FEATURES, FEATURES))])
    x = torch.ones(ROWS, FEATURES)
    seconds: dict[Team, list[float]] = {team: [] for team in teams}
    for _ in range(ROUNDS):
        for team in teams:
            native.use_threads(library, team.threads, team.cpus)
            matrix.multiply(x)  # threads come to their processors
            started = time.perf_counter()
            matrix.multiply(x)
            seconds[team].append(time.perf_counter() - started)
    return seconds
