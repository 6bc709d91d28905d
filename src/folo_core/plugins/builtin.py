"""The parts that the core itself offers, as a plugin like any other: running steps in the caller's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins.hookspecs import hookimpl
from folo_core.plugins.specs import ExecutorSpec

if TYPE_CHECKING:
    from folo_core.components import ExecutorParts
    from folo_core.execution.interface import Executor


def _in_process(parts: ExecutorParts) -> Executor:
    from folo_core.execution.in_process import InProcessExecutor
    from folo_core.execution.model_runner import ModelRunner

    runner = ModelRunner(
        model=parts.model,
        backend=parts.backend,
        samplers=parts.samplers,
        processors=parts.processors,
        config=parts.config,
        num_blocks=parts.num_blocks,
        num_host_blocks=parts.num_host_blocks,
    )
    return InProcessExecutor(runner, run_ahead=parts.config.scheduler.run_ahead)


@hookimpl
def folo_executors() -> list[ExecutorSpec]:
    """Offer ``in-process``."""
    return [ExecutorSpec(name="in-process", help="Runs every step in the caller's process.", factory=_in_process)]
