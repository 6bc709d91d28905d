"""What one scheduler step costs per sequence: steady decoding, and the step that admits a whole queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.config import SchedulerConfig
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.plugins.manager import load_registry
from folo_core.request import Request
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.interface import SchedulerState, StepBudget
from timing import measure, show

if TYPE_CHECKING:
    from folo_core.scheduling.interface import Scheduler

BLOCK_SIZE = 16
PROMPT = tuple(range(128))
PARAMS = SamplingParams(max_tokens=4096, temperature=0.0)


def waiting_state(scheduler: Scheduler, width: int) -> SchedulerState:
    """Return ``width`` requests in the queue, with memory for all that they could generate here."""
    state = SchedulerState.empty(KVCacheManager(width * 256 + 1, BLOCK_SIZE), scheduler.order)
    for number in range(width):
        request = Request(
            request_id=str(number), prompt_token_ids=PROMPT, params=PARAMS, seed=0, arrival=number, sampler="greedy"
        )
        request.open_sequence(number)
        state.waiting.push(request)
    return state


def main() -> None:
    """Print microseconds per sequence for several batch widths."""
    scheduler = load_registry().get("schedulers", "fcfs").build(SchedulerConfig())
    for width in (1, 32, 256):
        budget = StepBudget(max_num_batched_tokens=width * 256, max_num_seqs=width, max_chunk_tokens=4096)
        admit, admit_best = measure(
            lambda w=width, b=budget: scheduler.schedule(waiting_state(scheduler, w), b), calls=2
        )
        build, build_best = measure(lambda w=width: waiting_state(scheduler, w), calls=2)
        state = waiting_state(scheduler, width)
        scheduler.schedule(state, budget)
        assert len(state.running) == width

        def decode(state: SchedulerState = state, budget: StepBudget = budget) -> None:
            for request in state.running:
                request.live[0].add_token_id(1)
            step = scheduler.schedule(state, budget)
            assert len(step.seq_ids) == len(state.running)

        steady, steady_best = measure(decode, calls=20)
        show(f"admission, per sequence of {width}", (admit - build) / width, (admit_best - build_best) / width)
        show(f"decode step, per sequence of {width}", steady / width, steady_best / width)


if __name__ == "__main__":
    main()
