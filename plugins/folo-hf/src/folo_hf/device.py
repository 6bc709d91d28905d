"""Chooses the device and the dtype, from what the machine has."""

from __future__ import annotations

from typing import Protocol

import attrs

from folo_core.errors import ModelLoadError

BF16_CAPABILITY = (8, 0)
"""First CUDA compute capability with bfloat16 arithmetic (Ampere)."""

FP16_CAPABILITY = (5, 3)
"""First CUDA compute capability with float16 arithmetic."""


class HardwareProbe(Protocol):
    """What the machine has. Tests give a fake one."""

    def cuda_devices(self) -> int:
        """Number of CUDA devices that can be used."""

    def cuda_capability(self, index: int) -> tuple[int, int]:
        """Compute capability, such as ``(8, 0)`` for an A100."""

    def cuda_name(self, index: int) -> str:
        """The device's name, for messages."""


@attrs.frozen
class TorchProbe:
    """Asks torch."""

    def cuda_devices(self) -> int:
        """Number of CUDA devices that torch can use."""
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def cuda_capability(self, index: int) -> tuple[int, int]:
        """Compute capability as torch reports it."""
        import torch

        return torch.cuda.get_device_capability(index)

    def cuda_name(self, index: int) -> str:
        """The device's name as torch reports it."""
        import torch

        return torch.cuda.get_device_name(index)


def resolve_device(device: str, probe: HardwareProbe) -> str:
    """``cpu`` or ``cuda:N``. ``auto`` takes the first CUDA device if there is one.

    Raises:
        ModelLoadError: the device does not exist here.
    """
    if device == "auto":
        return "cuda:0" if probe.cuda_devices() else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind != "cuda" or not (number or "0").isdigit():
        raise ModelLoadError(f'device: {device!r}: give "auto", "cpu", "cuda" or "cuda:N"')
    index, count = int(number or 0), probe.cuda_devices()
    if index >= count:
        raise ModelLoadError(f'device: {device!r}: this machine has {count} CUDA devices; give "cpu" or "auto"')
    return f"cuda:{index}"


def resolve_dtype(dtype: str, device: str, probe: HardwareProbe) -> str:
    """``float32``, ``float16`` or ``bfloat16``.

    ``auto`` is float32 on a CPU, bfloat16 on CUDA devices of compute capability 8.0 or more, and float16 on older
    ones; the dtype a checkpoint was saved in does not change that, since what the processor computes fast in does not
    depend on it. An explicit dtype is honoured wherever the device computes in it natively.

    Raises:
        ModelLoadError: the device cannot compute in the dtype.
    """
    if not device.startswith("cuda"):
        return _cpu_dtype(dtype)
    index = int(device.partition(":")[2] or 0)
    capability = probe.cuda_capability(index)
    if dtype == "auto":
        return _best_cuda_dtype(capability)
    needed = {"bfloat16": BF16_CAPABILITY, "float16": FP16_CAPABILITY}.get(dtype, (0, 0))
    if capability < needed:
        have, want = (f"{major}.{minor}" for major, minor in (capability, needed))
        raise ModelLoadError(
            f"dtype: {dtype!r}: {probe.cuda_name(index)} has compute capability {have} and {dtype} needs {want}; "
            f'give "{_best_cuda_dtype(capability)}" or "auto"'
        )
    return dtype


def _best_cuda_dtype(capability: tuple[int, int]) -> str:
    if capability >= BF16_CAPABILITY:
        return "bfloat16"
    return "float16" if capability >= FP16_CAPABILITY else "float32"


def _cpu_dtype(dtype: str) -> str:
    """On a CPU bfloat16 and float16 run everywhere, if slowly: an explicit wish is honoured."""
    return "float32" if dtype == "auto" else dtype
