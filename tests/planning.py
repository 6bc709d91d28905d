"""Requests, states and steps without an engine: what a scheduler decides, seen step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from folo_core.kv_cache.manager import KVCacheManager
from folo_core.request import Request
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.costs import PreemptionCosts
from folo_core.scheduling.interface import SchedulerState, StepBudget
from folo_core.scheduling.planner import StepPlanner
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.scheduling.interface import SchedulerOutput

SIZE = 4
"""Tokens in a block."""


def by_arrival(request: Request) -> tuple[int, ...]:
    """The order of first come, first served."""
    return (request.arrival,)


class Desk:
    """A scheduler's state, the requests in it, and steps whose results are given by hand."""

    def __init__(
        self,
        num_blocks: int = 65,
        *,
        order: Any = by_arrival,
        num_host_blocks: int = 0,
        mode: str = "recompute",
        cached: bool = True,
        **budget: Any,
    ) -> None:
        kv = KVCacheManager(num_blocks, SIZE, enable_prefix_caching=cached, num_host_blocks=num_host_blocks)
        self.order = order
        self.state = SchedulerState.empty(kv, order, PreemptionCosts(mode=mode))
        limits = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_chunk_tokens": 64}
        self.budget = StepBudget(**limits | budget)
        self.requests: dict[str, Request] = {}
        self._seq_ids = 0

    def ask(self, name: str, prompt: Sequence[int], **fields: Any) -> Request:
        """Queue a request."""
        params = fields.pop("params", SamplingParams(max_tokens=64))
        fields = {"arrival": len(self.requests), "seed": 0} | fields
        request = Request(request_id=name, prompt_token_ids=tuple(prompt), params=params, **fields)
        request.open_sequence(self._next_id())
        self.requests[name] = request
        self.state.waiting.push(request)
        return request

    def widen(self, request: Request, *newest: int) -> None:
        """Give a request one more sequence for each of these tokens, which is its newest; ``width`` must allow them."""
        for token in newest:
            child = request.fork_sequence(request.live[0], self._next_id())
            child.data.output_token_ids[-1:] = [token]
            child.data._token_ids = None
            request.live.append(child)

    def plan(self) -> StepPlanner:
        """Begin a step."""
        self.state.kv.begin_step()
        return StepPlanner(self.state, self.budget, self.order)

    def admit(self, *requests: Request) -> SchedulerOutput:
        """Run a step that admits these requests."""
        planner = self.plan()
        for request in requests:
            assert planner.admit(request)
        self.finish(planner.output)
        return planner.output

    def step(self, scheduler: Any) -> SchedulerOutput:
        """Run a step that a policy plans, and check what every step keeps."""
        self.state.kv.begin_step()
        output = scheduler.schedule(self.state, self.budget)
        assert output.num_tokens <= self.budget.max_num_batched_tokens
        assert self.state.num_running_seqs <= self.budget.max_num_seqs
        self.finish(output)
        return output

    def finish(self, output: SchedulerOutput, token: int = 9) -> None:
        """Take in a step's result: what was computed can be found, and who samples gets a token."""
        self.check()
        samples = dict(zip(output.seq_ids, output.samples, strict=True))
        for request in self.state.running:
            for sequence in request.live:
                self.state.kv.commit(sequence, sequence.num_computed_tokens)
                if samples.get(sequence.seq_id):
                    sequence.add_token_id(token)

    def end(self, request: Request) -> None:
        """End a running request."""
        for sequence in list(request.live):
            self.state.kv.release(sequence)
            request.close_sequence(sequence, SequenceStatus.FINISHED_LENGTH_CAPPED)
        self.state.running.remove(request)

    def check(self) -> None:
        """Check the books of device and host."""
        self.state.kv.check_integrity(s for request in self.requests.values() for s in request.live)

    @property
    def running(self) -> list[str]:
        """Ids of the running requests, in the policy's order."""
        return [request.request_id for request in self.state.running]

    @property
    def waiting(self) -> set[str]:
        """Ids of the waiting requests."""
        return {request.request_id for request in self.state.waiting}

    def _next_id(self) -> int:
        self._seq_ids += 1
        return self._seq_ids - 1
