"""Schedulers that serve requests in a fixed order and let the last in that order yield memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.scheduling.planner import StepPlanner

if TYPE_CHECKING:
    from folo_core.config import SchedulerConfig
    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerOutput, SchedulerState, StepBudget


class FCFSScheduler:
    """First come, first served. Running requests go on before any is admitted; the youngest yields first."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    def order(self, request: Request) -> tuple[int, ...]:
        """Sort by arrival."""
        return (request.arrival,)

    def schedule(self, state: SchedulerState, budget: StepBudget) -> SchedulerOutput:
        """Extend what runs, oldest first; then admit from the queue while nobody had to yield."""
        planner = StepPlanner(state, budget, self.order)
        position = 0
        while position < len(state.running):
            request = state.running[position]
            if planner.extend(request):
                position += 1
            else:
                planner.preempt(state.running[-1])
        if not planner.output.preempted:
            while state.waiting and planner.admit(state.waiting.peek()):
                pass
        return planner.output


class PriorityScheduler(FCFSScheduler):
    """Lower ``priority`` first, then by arrival; the least urgent request yields first."""

    def order(self, request: Request) -> tuple[int, ...]:
        """Sort by priority, then by arrival."""
        return (request.priority, request.arrival)
