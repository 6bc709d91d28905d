"""Layered configuration: frozen sections, checked as they are built, composed by EngineConfig.

Why layers: each section is what one part of the engine reads, so a part can be tested with its own section alone,
and a rule between sections lives in EngineConfig, the only place that sees both.
"""

from __future__ import annotations

from folo_core.config.cache import CacheConfig
from folo_core.config.convert import dumps_env, dumps_json, dumps_toml, load
from folo_core.config.engine import EngineConfig
from folo_core.config.migrations import CURRENT_VERSION
from folo_core.config.model import ModelConfig
from folo_core.config.parallel import ParallelConfig
from folo_core.config.scheduler import SchedulerConfig
from folo_core.config.sections import describe_fields, structure, unstructure

__all__ = [
    "CURRENT_VERSION",
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "describe_fields",
    "dumps_env",
    "dumps_json",
    "dumps_toml",
    "load",
    "structure",
    "unstructure",
]
