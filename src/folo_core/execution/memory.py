"""How many bytes keys and values may take on a device."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from folo_core.config import EngineConfig
    from folo_core.execution.interface import ModelInfo

CPU_DEFAULT_BYTES = 2 * 2**30
CUDA_RESERVE_BYTES = 2**30
"""Left free on CUDA for activations and kernels' own work space."""
LOGITS_COPIES = 4
"""Float32 tensors as large as the logits that sampling may hold at once."""


def kv_cache_budget(config: EngineConfig, info: ModelInfo, device: torch.device, max_model_len: int) -> int:
    """Return the bytes that keys and values may take.

    On CUDA: the configured share of the device's memory, less what is in use, less a reserve.
    On the CPU: the smallest of 2 GiB, a quarter of the free memory, and what ``max_num_seqs`` longest
    sequences need. An explicit ``kv_cache_bytes`` overrides both.
    """
    if config.cache.kv_cache_bytes is not None:
        return config.cache.kv_cache_bytes
    needed = config.scheduler.max_num_seqs * max_model_len * info.kv_bytes_per_token
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        logits = LOGITS_COPIES * 4 * config.scheduler.max_num_seqs * info.vocab_size
        usable = int(total * config.cache.gpu_memory_utilization) - (total - free) - logits - CUDA_RESERVE_BYTES
        return min(needed, max(usable, 0))
    return min(needed, CPU_DEFAULT_BYTES, _free_host_memory() // 4)


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
