"""Keys and values stored in float8: where that can be, and by which scales they are divided."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

from folo_core.errors import ConfigError

if TYPE_CHECKING:
    from folo_hf.device import HardwareProbe
    from folo_hf.device_decoder import DeviceDecoder
    from folo_hf.probe import ModelShape

CAPABILITY = (8, 9)
"""First CUDA compute capability that converts float8 (Ada, Hopper)."""

DTYPES = ("float16", "bfloat16")
"""What the model may compute in."""

LARGEST = 448.0
"""Of float8 e4m3."""

MARGIN = 8
"""How many times the probe's largest key or value fits: its few tokens are not a text's largest ones.

Room costs nothing until it reaches e4m3's smallest normal number, 2**-6: with a margin of 8, numbers down to 1 / 1792
of the probe's largest keep all their digits whatever that is, and smaller ones lose them one by one."""


def check_fp8_kv(device: str, dtype: str, hardware: HardwareProbe) -> None:
    """Check that keys and values can be stored in float8.

    Raises:
        ConfigError: they cannot; the message says why, and what to give instead.
    """
    reason = None
    if not device.startswith("cuda"):
        reason = f"on {device}: takes a CUDA device of compute capability 8.9 or more"
    elif hardware.cuda_capability(index := int(device.partition(":")[2] or 0)) < CAPABILITY:
        major, minor = hardware.cuda_capability(index)
        reason = f"{hardware.cuda_name(index)} has compute capability {major}.{minor} and fp8 needs 8.9"
    elif dtype not in DTYPES:
        reason = f"queries in {dtype} on {device}: give dtype={' or '.join(map(repr, DTYPES))}"
    if reason is not None:
        raise ConfigError(f"cache.kv_cache_dtype: 'fp8': {reason}, or leave kv_cache_dtype 'auto'")


def with_rounded_kv(shape: ModelShape, decoder: DeviceDecoder | None) -> ModelShape:
    """Return the shape with keys and values in float8, each layer's scales by what the probe saw of it.

    A decoder that writes keys and values itself is told the scales; other models' are written by the backend.
    """
    specs = [
        attrs.evolve(spec, dtype=torch.float8_e4m3fn, k_scale=scale_for(keys), v_scale=scale_for(values))
        for spec, (keys, values) in zip(shape.specs, shape.peaks, strict=True)
    ]
    if decoder is not None:
        decoder.scales = [(spec.k_scale, spec.v_scale) for spec in specs]
    return attrs.evolve(shape, specs=specs)


def scale_for(peak: float) -> float:
    """Return the scale of keys or values of which the probe's largest has this magnitude.

    A scale is the smallest power of two that brings ``MARGIN`` times the peak into float8's range. A power, because
    float8's digits are the same at any scale: what a scale does is keep numbers from being cut off at 448 or from
    running out of digits near zero, and a division by a power of two is exact. So the last bits of a probe, which
    differ between devices, change no scale unless the peak is next to a power itself. Without a calibration the scale
    would be 1, at which some models' keys, of a few hundreds, come near 448.
    """
    return 1.0 if peak == 0 else 2.0 ** math.ceil(math.log2(peak * MARGIN / LARGEST))
