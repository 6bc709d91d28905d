"""Entry point: offers the attention backends of this distribution. Importing it imports no torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import AttentionBackendSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_attention.fixed import FixedOrderBackend
    from folo_attention.native import NativeBackend
    from folo_attention.sdpa import SdpaBackend
    from folo_attention.triton import TritonBackend
    from folo_core.config import EngineConfig

OLDEST_MAJOR = 8
"""Compute capability from which on the Triton kernels run: bfloat16 and asynchronous copies."""


def _build_sdpa(config: EngineConfig) -> SdpaBackend:  # noqa: ARG001 (the backend has no options)
    from folo_attention.sdpa import SdpaBackend

    return SdpaBackend()


def _sdpa_supports(device: str, dtype: str) -> str | None:
    if device.partition(":")[0] not in {"cpu", "cuda"}:
        return f"sdpa is tested on cpu and cuda, not on {device}"
    if dtype not in {"float32", "float16", "bfloat16", "float64"}:
        return f"sdpa needs keys and values in a floating dtype, not {dtype}"
    return None


def _build_native(config: EngineConfig) -> NativeBackend:  # noqa: ARG001 (the backend has no options)
    from folo_attention.native import NativeBackend

    return NativeBackend()


def _native_supports(device: str, dtype: str) -> str | None:
    if device != "cpu":
        return f"native runs on cpu, not on {device}"
    if dtype != "float32":
        return f"native needs keys and values in float32, not {dtype}"
    from folo_kernels.library import why_not

    return why_not()


def _build_fixed(config: EngineConfig) -> FixedOrderBackend:  # noqa: ARG001 (the backend has no options)
    from folo_attention.fixed import FixedOrderBackend

    return FixedOrderBackend()


def _fixed_supports(device: str, dtype: str) -> str | None:
    if device != "cpu":
        return f"fixed-order is measured on cpu, not on {device}"
    if dtype != "float32":
        return f"fixed-order needs keys and values in float32, not {dtype}"
    return None


def _build_triton(config: EngineConfig) -> TritonBackend:
    from folo_attention.triton import TritonBackend

    return TritonBackend(max_rows=config.scheduler.max_num_seqs, max_model_len=config.max_model_len)


def _triton_supports(device: str, dtype: str) -> str | None:
    if device.partition(":")[0] != "cuda":
        return f"triton runs on cuda, not on {device}"
    if dtype not in {"float16", "bfloat16", "float32"}:
        return f"triton needs keys and values in float16, bfloat16 or float32, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton needs the package triton, which is not installed"
    return _too_old(device)


def _too_old(device: str) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "triton needs a CUDA device, and torch finds none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < OLDEST_MAJOR:
        return f"triton needs compute capability {OLDEST_MAJOR}.0 or later, {device} has {major}.{minor}"
    return None


@hookimpl
def folo_attention_backends() -> Sequence[AttentionBackendSpec]:
    """Offer torch's own operators, Folo's kernels for CPUs and for CUDA devices, and a backend of invariant bits."""
    return [
        AttentionBackendSpec(
            name="sdpa",
            help="paged attention with PyTorch's own operators, on CPU and CUDA",
            factory=_build_sdpa,
            supports=_sdpa_supports,
            priority=0,
            capabilities=frozenset({"gqa", "sliding_window", "softcap"}),
        ),
        AttentionBackendSpec(
            name="native",
            help="paged attention with Folo's own kernels, which read blocks where they lie, on CPU in float32",
            factory=_build_native,
            supports=_native_supports,
            priority=10,
            capabilities=frozenset({"gqa", "sliding_window", "softcap"}),
        ),
        AttentionBackendSpec(
            name="fixed-order",
            help="paged attention whose rows are the same bits in any batch and any chunk, on CPU",
            factory=_build_fixed,
            supports=_fixed_supports,
            priority=-10,
            capabilities=frozenset({"batch-invariant", "gqa", "sliding_window", "softcap"}),
        ),
        AttentionBackendSpec(
            name="triton",
            help="paged attention with Folo's own kernels on CUDA: keys of a shared prefix are read once",
            factory=_build_triton,
            supports=_triton_supports,
            priority=10,
            capabilities=frozenset({"fp8-kv", "gqa", "sliding_window", "softcap"}),
        ),
    ]
