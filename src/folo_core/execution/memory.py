"""How many bytes keys and values may take on a device."""

from __future__ import annotations

import gc
import logging
import os
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from folo_core.attention.interface import AttentionMetadata
from folo_core.errors import ConfigError
from folo_core.execution.graphs import bucket_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.attention.interface import AttentionBackend
    from folo_core.config import EngineConfig
    from folo_core.execution.interface import LoadedModel, ModelInfo

logger = logging.getLogger(__name__)

CPU_DEFAULT_BYTES = 2 * 2**30
CUDA_RESERVE_BYTES = 2**28
"""Left free on CUDA for what the trial step does not show: libraries' work space, and fragmentation."""
LOGITS_COPIES = 4
"""Float32 tensors as large as the logits that sampling may hold at once."""


class Meter(Protocol):
    """Tells how much of a device's memory a piece of work takes."""

    def start(self) -> None:
        """Begin anew."""

    def peak(self) -> int:
        """Most bytes in use at any moment since ``start``, beyond those in use then."""


class CudaMeter:
    """Asks torch's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Begin anew."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Most bytes in use at any moment since ``start``, beyond those in use then."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def kv_cache_budget(
    config: EngineConfig,
    model: LoadedModel,
    backend: Callable[[], AttentionBackend],
    max_model_len: int,
) -> int:
    """Return the bytes that keys and values may take, if ``kv_cache_bytes`` does not say.

    On CUDA: the configured share of the device's memory, less what is in use, less what the largest step takes, which
    is found out by running one. On the CPU: the smallest of 2 GiB, a quarter of the free memory, and what
    ``max_num_seqs`` longest sequences need.

    Args:
        config: the engine's.
        model: loaded; the trial step binds it to a backend of its own.
        backend: builds an attention backend that nobody has allocated yet.
        max_model_len: longest sequence in tokens.

    Raises:
        ConfigError: the largest step does not fit the device at all.
    """
    if config.cache.kv_cache_bytes is not None:
        return config.cache.kv_cache_bytes
    info, device = model.info, model.device
    needed = config.scheduler.max_num_seqs * max_model_len * info.kv_bytes_per_token
    if device.type != "cuda":
        return min(needed, CPU_DEFAULT_BYTES, _free_host_memory() // 4)
    step = trial_step_bytes(config, model, backend(), max_model_len, CudaMeter(device))
    free_cached_memory()
    free, total = torch.cuda.mem_get_info(device)
    reserve = CUDA_RESERVE_BYTES + recorded_bytes(config, info)
    usable = int(total * config.cache.gpu_memory_utilization) - (total - free) - step - reserve
    logger.info("a step takes up to %.2f GiB; %.2f GiB are left for keys and values", step / 2**30, usable / 2**30)
    return min(needed, max(usable, 0))


def recorded_bytes(config: EngineConfig, info: ModelInfo) -> int:
    """Return what recorded decode steps keep: the logits of each size, and as much again for what they work with."""
    if not config.model.graphs:
        return 0
    dtype: torch.dtype = getattr(torch, info.dtype)
    return 2 * sum(bucket_sizes(config.scheduler.max_num_seqs)) * info.vocab_size * dtype.itemsize


@torch.inference_mode()
def trial_step_bytes(
    config: EngineConfig, model: LoadedModel, backend: AttentionBackend, max_model_len: int, meter: Meter
) -> int:
    """Run the largest step that the scheduler may ask for, over blocks of its own, and return what it took.

    Counted are activations, attention's work space and the logits with their float32 copies; the blocks are not.

    Raises:
        ConfigError: the device's memory could not hold it.
    """
    size, num_tokens = config.cache.block_size, config.scheduler.max_num_batched_tokens
    longest = min(max_model_len, num_tokens)
    lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
    blocks = -(-longest // size)
    rows = min(config.scheduler.max_num_seqs, num_tokens)
    try:
        backend.allocate(model.kv_cache_specs, 1 + blocks * len(lengths), size, model.device)
        model.bind(backend)
        meter.start()
        tokens, positions, metadata = _prompts(lengths, blocks, size, model.device)
        if backend.wants_device_metadata:
            metadata.to_device(model.device)
        metadata.plan = backend.plan(metadata)
        wanted = torch.arange(num_tokens - rows, num_tokens, device=model.device)
        logits = model.forward(tokens, positions, wanted, metadata)
        copies = [logits.float().clone() for _ in range(LOGITS_COPIES)]
        del copies
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"scheduler.max_num_batched_tokens: {num_tokens}: a step of so many tokens does not fit "
            f"{model.info.device} beside the weights: lower it, or max_num_seqs"
        )
        raise ConfigError(message) from None
    return meter.peak()


def _prompts(
    lengths: list[int], blocks: int, block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Lay prompts of these lengths end to end, each over ``blocks`` blocks of its own."""
    counts = np.array(lengths, dtype=np.int32)
    query_start = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    tables = 1 + np.arange(len(lengths) * blocks, dtype=np.int32).reshape(len(lengths), blocks)
    positions = np.concatenate([np.arange(count, dtype=np.int64) for count in lengths])
    rows = np.repeat(np.arange(len(lengths)), counts)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    metadata = AttentionMetadata(
        num_tokens=len(positions),
        query_start=query_start,
        seq_lens=counts,
        block_tables=tables,
        slot_mapping=torch.from_numpy(slots).to(device),
        block_size=block_size,
    )
    return (
        torch.zeros(len(positions), dtype=torch.int64, device=device),
        torch.from_numpy(positions).to(device),
        metadata,
    )


def side_model_budget(config: EngineConfig, info: ModelInfo, device: torch.device) -> int:
    """Return the KV blocks of a second model: what its longest sequences need, but no more than 2 GiB.

    On the CPU no more than a quarter of the free memory either; always enough for one longest sequence.
    """
    block = config.cache.block_size * info.kv_bytes_per_token
    one = -(-(config.max_model_len or info.max_model_len) // config.cache.block_size)
    limit = CPU_DEFAULT_BYTES if device.type == "cuda" else min(CPU_DEFAULT_BYTES, _free_host_memory() // 4)
    return max(one, min(config.scheduler.max_num_seqs * one, limit // block))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out. On the CPU torch says so in a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free_cached_memory() -> None:
    """Give what torch keeps for later back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _free_host_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
