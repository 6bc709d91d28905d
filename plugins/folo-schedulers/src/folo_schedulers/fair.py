"""Fairness between tenants: the virtual token counter.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2: whoever has been served least comes
next, and a tenant who was away does not come back with a claim on what it did not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.scheduling.planner import StepPlanner

if TYPE_CHECKING:
    from folo_core.config import SchedulerConfig
    from folo_core.request import Request
    from folo_core.scheduling.interface import SchedulerOutput, SchedulerState, StepBudget

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a prompt token and a generated token count, as in the paper's evaluation."""


class FairScheduler:
    """Serves the tenant with the smallest counter next; the tenant with the largest yields memory first.

    While two tenants both have requests waiting, the service they get differs by a bound that does not grow with time
    (theorem 4.4 of the paper), however many requests either of them sends.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.counters: dict[str, float] = {}
        """Weighted tokens that each tenant was served, lifted whenever it comes back."""
        self._present: set[str] = set()
        self._last_left = 0.0

    def order(self, request: Request) -> tuple[int, ...]:
        """Sort by arrival, among the requests of one tenant."""
        return (request.arrival,)

    def on_tokens(self, request: Request, num_tokens: int) -> None:
        """Charge a tenant for generated tokens."""
        self._charge(request, OUTPUT_WEIGHT * num_tokens)

    def schedule(self, state: SchedulerState, budget: StepBudget) -> SchedulerOutput:
        """Extend what runs, the least served tenant's first; then admit in the same order while nobody had to yield."""
        self._welcome(state)
        planner = StepPlanner(state, budget, self.order)
        queue = sorted(state.running, key=self._rank)
        position = 0
        while position < len(queue):
            if planner.extend(queue[position]):
                position += 1
            else:
                planner.preempt(queue.pop())
        if not planner.output.preempted:
            while (request := self._least_served(state)) is not None and planner.admit(request):
                if not request.metrics.num_preemptions:
                    self._charge(request, PROMPT_WEIGHT * len(request.prompt_token_ids))
        return planner.output

    def _charge(self, request: Request, amount: float) -> None:
        self.counters[request.tenant] = self.counters.get(request.tenant, 0.0) + amount

    def _rank(self, request: Request) -> tuple[float, int]:
        return self.counters.get(request.tenant, 0.0), request.arrival

    def _least_served(self, state: SchedulerState) -> Request | None:
        return min(state.waiting.firsts(), key=self._rank, default=None)

    def _welcome(self, state: SchedulerState) -> None:
        """Lift the counters of tenants that were away: to the least served one's here, or the last one's to leave."""
        here = {request.tenant for request in (*state.waiting.firsts(), *state.running)}
        left, stayed = self._present - here, self._present & here
        if left:
            self._last_left = max(self.counters.get(tenant, 0.0) for tenant in left)
        if here != self._present:
            floor = min((self.counters.get(tenant, 0.0) for tenant in stayed), default=self._last_left)
            for tenant in here - stayed:
                self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
            # A tenant far below everybody else's counter gains nothing from being remembered.
            self.counters = {t: c for t, c in self.counters.items() if t in here or c > floor}
            self._present = here
