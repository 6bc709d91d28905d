"""The executor that runs steps in the caller's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.errors import StepOutOfMemoryError
from folo_core.execution.memory import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.execution.interface import ModelInfo, StepResult
    from folo_core.execution.model_runner import ModelRunner
    from folo_core.request import Request
    from folo_core.sampling_params import SamplingParams
    from folo_core.scheduling.interface import SchedulerOutput
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True)
class StartedStep:
    """A step that the device was asked for; on a CPU it has run by then."""

    wait: Callable[[], StepResult]

    def result(self) -> StepResult:
        """Return the result once the device has come that far."""
        return self.wait()


class InProcessExecutor:
    """Starts each step when it is submitted.

    Args:
        runner: runs them.
        run_ahead: whether the next step is started before the result of one is asked for; None for where that gains
            time, since the device works by itself.
    """

    def __init__(self, runner: ModelRunner, *, run_ahead: bool | None = None) -> None:
        self.runner = runner
        self.model_info: ModelInfo = runner.model.info
        ahead = runner.model.device.type == "cuda" if run_ahead is None else run_ahead
        self.max_steps_in_flight = 2 if ahead else 1
        runner.warm_up()

    def steady_after(self, sampler: str, params: SamplingParams) -> int | None:
        """Return from how many output tokens on such a request may run ahead (see ``Executor``)."""
        return self.runner.steady_after(sampler, params)

    def reparents(self, sampler: str) -> bool:
        """Return whether rows of this sampler that run ahead may continue one another (see ``Executor``)."""
        return self.runner.stage.reparents(sampler)

    def add_request(self, request: Request) -> None:
        """Make a request known to the runner and to its sampler."""
        self.runner.stage.samplers[request.sampler].part.add_request(request)  # may refuse it
        self.runner.requests[request.request_id] = request

    def submit(self, scheduled: SchedulerOutput) -> StartedStep:
        """Start the step now.

        Raises:
            StepOutOfMemoryError: the device's memory could not hold it; what the failed step held is free again.
        """
        try:
            return StartedStep(self.runner.start(scheduled))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = next(iter(str(error).splitlines()), type(error).__name__)  # Python's own says nothing
            text = f"step of {scheduled.num_tokens} tokens in {self.current_part()}: {why}"
        # Only now are the frames gone that hold the failed step's tensors.
        free_cached_memory()
        raise StepOutOfMemoryError(text)

    def rank(self, request: Request) -> list[Sequence]:
        """Ask the request's sampler for its ended sequences, best first.

        Raises:
            PluginError: the sampler raised, or returned what is not the request's own, or one sequence twice.
        """
        named = self.runner.stage.samplers[request.sampler]
        try:
            ranked: list[Sequence] = named.part.finish(request)
            own = {sequence.seq_id for sequence in request.finished}
            found = [sequence.seq_id for sequence in ranked]
            if not own.issuperset(found) or len(set(found)) < len(found):
                message = f"finish returned sequences {found}: expected some of the request's own {sorted(own)}, once"
                raise ValueError(message)  # noqa: TRY301 (a wrong answer is a fault like any other)
        except Exception as error:
            raise named.fault("sampler", error) from error
        return ranked

    def remove_request(self, request_id: str) -> None:
        """Forget a request that has ended."""
        request = self.runner.requests.pop(request_id, None)
        if request is not None:
            self.runner.stage.samplers[request.sampler].part.remove_request(request_id)

    def current_part(self) -> str:
        """Name what runs right now."""
        return self.runner.current_part()

    def shutdown(self) -> None:
        """Nothing outlives the process."""
