"""Entry point: names the schedulers, imports them only when one is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SchedulerSpec

if TYPE_CHECKING:
    from folo_core.config import SchedulerConfig
    from folo_core.scheduling.interface import Scheduler


def _fcfs(config: SchedulerConfig) -> Scheduler:
    from folo_schedulers.ordered import FCFSScheduler

    return FCFSScheduler(config)


def _priority(config: SchedulerConfig) -> Scheduler:
    from folo_schedulers.ordered import PriorityScheduler

    return PriorityScheduler(config)


def _fair(config: SchedulerConfig) -> Scheduler:
    from folo_schedulers.fair import FairScheduler

    return FairScheduler(config)


@hookimpl
def folo_schedulers() -> list[SchedulerSpec]:
    """Offer ``fcfs``, ``priority`` and ``fair``."""
    return [
        SchedulerSpec(name="fcfs", help="First come, first served; the youngest yields memory first.", factory=_fcfs),
        SchedulerSpec(
            name="priority", help="Lower priority value first, then arrival; preempts for it.", factory=_priority
        ),
        SchedulerSpec(name="fair", help="The tenant who was served least comes next.", factory=_fair),
    ]
