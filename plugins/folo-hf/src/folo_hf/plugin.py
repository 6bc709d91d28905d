"""Entry point: offers the ``hf`` model loader. Importing it imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ModelLoaderSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.config import EngineConfig
    from folo_hf.loader import HfLoader


def _build(config: EngineConfig) -> HfLoader:
    from folo_hf import lean

    lean.install()
    from folo_hf.loader import HfLoader

    return HfLoader(config)


def _can_load(model: str) -> bool:  # noqa: ARG001 (a name that is no path is taken for a hub id)
    return True


@hookimpl
def folo_model_loaders() -> Sequence[ModelLoaderSpec]:
    """Offer ``hf``: folders of safetensors, GGUF files and hub ids, through transformers."""
    return [
        ModelLoaderSpec(
            name="hf",
            help="causal language models of transformers: a safetensors folder, a GGUF file or a hub id",
            factory=_build,
            can_load=_can_load,
            priority=0,
            capabilities=frozenset({"safetensors", "gguf", "hub"}),
        )
    ]
