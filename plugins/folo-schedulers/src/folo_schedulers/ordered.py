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
        """Extend what runs, first in order first; then admit from the queue while nobody had to yield."""
        planner = StepPlanner(state, budget, self.order)
        position, running, extend = 0, state.running, planner.extend
        while position < len(running):
            request = running[position]
            if state.waiting and self._make_way(planner, request):
                position += 1  # another was admitted before it
            elif position < len(running) and running[position] is request:
                if extend(request):
                    position += 1
                else:
                    planner.preempt(running[-1])
        if not planner.output.preempted:
            while state.waiting and planner.admit(state.waiting.peek()):
                pass
        return planner.output

    def _make_way(self, planner: StepPlanner, running: Request) -> bool:
        """Admit one that waits and comes before ``running``, perhaps in its place; here nobody yields to a newcomer."""
        return False


class PriorityScheduler(FCFSScheduler):
    """Lower ``priority`` first, then by arrival; the least urgent request yields, also to a newcomer more urgent."""

    def order(self, request: Request) -> tuple[int, ...]:
        """Sort by priority, then by arrival."""
        return (request.priority, request.arrival)

    def _make_way(self, planner: StepPlanner, running: Request) -> bool:
        """Admit the first in line before ``running`` if it outranks it, at the cost of those that it outranks."""
        state = planner.state
        if not _outranks(following := state.waiting.peek(), running):
            return False
        if planner.admit(following):
            return True
        victims = [other for other in state.running if _outranks(following, other) and planner.can_preempt(other)]
        if not planner.could_admit(following, victims):
            return False
        while victims:
            planner.preempt(victims.pop())
            if planner.admit(following):
                return True
        return False


def _outranks(waiting: Request, running: Request) -> bool:
    """Whether ``waiting`` is more urgent. Among equals nobody yields to a newcomer."""
    return waiting.priority < running.priority
