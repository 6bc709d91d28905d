"""What the device can do at most: bytes and products per second, and the seconds a workload takes at that rate."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_workloads import Workload
    from shapes import Shape


@attrs.frozen(kw_only=True)
class Ceilings:
    """Rates measured on this device."""

    copy: float
    """Bytes read and written per second."""
    matmul: float
    """Operations per second of a product of two square bfloat16 matrices (float32 on a CPU)."""


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _seconds(work: Callable[[], object], device: str, *, repeats: int = 10, calls: int = 5) -> float:
    """Median seconds of a call, of several in a row: waiting for the device once must not count for one."""
    work()
    samples = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def measure(device: str, *, tiny: bool) -> Ceilings:
    """Copy 2 GiB, and multiply matrices of 8192 x 8192 (tiny: 1 MiB and 64 x 64)."""
    size, side = (2**20, 64) if tiny else (2**31, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _seconds(lambda: target.copy_(source), device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Ceilings(copy=copy, matmul=2 * side**3 / _seconds(lambda: left @ right, device))


def limit_seconds(workload: Workload, shape: Shape, ceilings: Ceilings, *, cached: bool = False) -> float:
    """Seconds of a workload if the device did nothing but what must be, at its measured rates.

    Prompts cost the products of the layers' weights, each distinct beginning once; each later step reads the weights
    once, and of every sequence its keys and values. Sequences that share a beginning could read less than is counted
    here, so for beams and samples this is no strict bound. ``cached``: the prompts' keys and values are there already.
    """
    lengths = [len(prompt) for prompt in workload.prompts]
    shared = _shared(workload.prompts) if workload.kind == "prefix" else 0
    computed = len(lengths) if cached else sum(lengths) - shared * (len(lengths) - 1)
    prefill = 2 * (shape.layer_parameters * computed + shape.head_parameters * len(lengths)) / ceilings.matmul
    read = sum(_contexts(length, new) for length, new in zip(lengths, workload.new, strict=True)) * workload.width
    steps = max(workload.new) - 1
    return prefill + (steps * shape.step_bytes + read * shape.kv_bytes_per_token) / ceilings.copy


def token_limit(workload: Workload, shape: Shape, ceilings: Ceilings) -> float:
    """Seconds between two tokens of one request: the weights, and keys and values of a sequence half grown."""
    context = len(workload.prompts[0]) + workload.new[0] / 2
    return (shape.step_bytes + context * shape.kv_bytes_per_token) / ceilings.copy


def _contexts(length: int, new: int) -> int:
    """Tokens read by all decoding steps of a request: the prompt's and those before, for every token but the first."""
    return sum(range(length + 1, length + new))


def _shared(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    count = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
