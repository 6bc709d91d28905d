"""Entry point: offers the attention backend ``flashinfer``. Importing it imports neither torch nor FlashInfer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import AttentionBackendSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.config import EngineConfig
    from folo_flashinfer.backend import FlashInferBackend

MEND = 'python -m pip install "folo-flashinfer[flashinfer]"'
DTYPES = {"float16", "bfloat16"}


def _build(config: EngineConfig) -> FlashInferBackend:  # noqa: ARG001 (the backend has no options)
    from folo_flashinfer.backend import FlashInferBackend, load_library

    return FlashInferBackend(load_library())


def _supports(device: str, dtype: str) -> str | None:
    if device.partition(":")[0] != "cuda":
        return f"flashinfer runs on cuda, not on {device}"
    if dtype not in DTYPES:
        return f"flashinfer needs keys and values in float16 or bfloat16, not {dtype}"
    if find_spec("flashinfer") is None:
        return f"flashinfer is not installed: {MEND}"
    return None


@hookimpl
def folo_attention_backends() -> Sequence[AttentionBackendSpec]:
    """Offer ``flashinfer``, below every backend that ``auto`` could take instead."""
    return [
        AttentionBackendSpec(
            name="flashinfer",
            help="paged attention with FlashInfer's kernels, on CUDA in float16 or bfloat16",
            factory=_build,
            supports=_supports,
            priority=-5,
            capabilities=frozenset({"gqa", "sliding_window", "softcap"}),
        )
    ]
