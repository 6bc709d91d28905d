"""Opens a model with the installed plugins and somebody who watches."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folo_core.llm import LLM
    from folo_core.plugins.registry import Registry


def open_registry(*watchers: object) -> Registry:
    """Load the installed plugins and those who watch."""
    from folo_core.plugins.manager import load_registry

    return load_registry(extra=watchers)


def open_model(registry: Registry, options: dict[str, Any]) -> LLM:
    """Load a model quietly: what model libraries have to tell is of no use here."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from folo_core.config import EngineConfig
    from folo_core.llm import LLM

    return LLM.from_config(EngineConfig.from_options(**options), registry)
