"""Folo: an LLM inference engine in which every decision is a plugin.

The public names below are imported on first use, so ``import folo_core`` is cheap and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folo_core.async_engine import AsyncEngine
    from folo_core.config import (
        CacheConfig,
        EngineConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
    )
    from folo_core.llm import LLM
    from folo_core.outputs import CompletionOutput, Logprob, RequestOutput
    from folo_core.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "async_engine",
    "CacheConfig": "config",
    "CompletionOutput": "outputs",
    "EngineConfig": "config",
    "LLM": "llm",
    "Logprob": "outputs",
    "ModelConfig": "config",
    "ParallelConfig": "config",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "SchedulerConfig": "config",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CacheConfig",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "ModelConfig",
    "ParallelConfig",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerConfig",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
