"""How much memory keys and values get: a stated budget on the CPU, a measured rest on CUDA (here with a fake meter)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engines import make_engine
from folo_core.config import EngineConfig
from folo_core.errors import ConfigError
from folo_core.execution import memory
from folo_core.execution.graphs import bucket_sizes
from folo_core.execution.memory import (
    CPU_DEFAULT_BYTES,
    is_out_of_memory,
    kv_cache_budget,
    trial_step_bytes,
)
from folo_core.testing.fakes import FakeBackend, FakeModel

GIB = 2**30


class CountingMeter:
    """Counts what the model was asked for between ``start`` and ``peak``."""

    def __init__(self, model: FakeModel) -> None:
        self.steps: list[int] = []
        model.before_forward = lambda tokens: self.steps.append(len(tokens))
        self.started = False

    def start(self) -> None:
        assert not self.steps, "what is measured begins after this"
        self.started = True

    def peak(self) -> int:
        assert self.started
        return 1000 * sum(self.steps)


def config_of(**options: Any) -> EngineConfig:
    return EngineConfig.from_options(**({"model": "fake", "block_size": 4} | options))


@pytest.mark.parametrize(("tokens", "longest", "sequences"), [(16, 64, 1), (40, 16, 3), (5, 5, 1)])
def test_the_trial_is_the_largest_step_that_the_scheduler_may_ask_for(
    tokens: int, longest: int, sequences: int
) -> None:
    model, seen = FakeModel(), []
    meter = CountingMeter(model)
    backend = FakeBackend()
    backend.plan = seen.append
    config = config_of(max_num_batched_tokens=tokens, max_num_seqs=4)
    assert trial_step_bytes(config, model, backend, longest, meter) == 1000 * tokens
    assert meter.steps == [tokens]
    assert len(seen[0].seq_lens) == sequences
    assert seen[0].seq_lens.sum() == tokens
    assert len(set(seen[0].slot_mapping.tolist())) == tokens, "no slot is written twice"
    assert min(seen[0].slot_mapping.tolist()) >= 4, "the null block stays untouched"


def test_a_step_that_never_fits_is_refused_by_name() -> None:
    model = FakeModel()

    def fail(tokens: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    meter = CountingMeter(model)
    model.before_forward = fail
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens: 64: .* lower it, or max_num_seqs"):
        trial_step_bytes(config_of(max_num_batched_tokens=64, max_num_seqs=4), model, FakeBackend(), 32, meter)


def test_another_fault_of_the_trial_is_not_taken_for_memory() -> None:
    model = FakeModel()
    meter = CountingMeter(model)

    def fail(tokens: torch.Tensor) -> None:
        raise ZeroDivisionError

    model.before_forward = fail
    with pytest.raises(ZeroDivisionError):
        trial_step_bytes(config_of(max_num_batched_tokens=64, max_num_seqs=4), model, FakeBackend(), 32, meter)


def cuda_budget(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, step: int, **options: Any) -> int:
    """The budget on a device with ``free`` of ``total`` bytes, where the largest step takes ``step``."""
    model = FakeModel(max_model_len=10**6)
    model.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(memory, "trial_step_bytes", lambda *args: step)
    monkeypatch.setattr(memory, "CudaMeter", lambda device: None)
    return kv_cache_budget(config_of(**options), model, FakeBackend, 10**6)


def test_on_cuda_the_cache_gets_the_configured_share_less_weights_and_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = partial(cuda_budget, monkeypatch, free=60 * GIB, total=80 * GIB, max_num_seqs=512)
    recorded = 2 * sum(bucket_sizes(512)) * 64 * 4
    rest = memory.CUDA_RESERVE_BYTES + recorded
    assert budget(step=3 * GIB, max_num_batched_tokens=4096) == min(
        72 * GIB - 20 * GIB - 3 * GIB - rest, 512 * 10**6 * 8
    )
    less = budget(step=50 * GIB, max_num_batched_tokens=4096)
    assert less == 72 * GIB - 20 * GIB - 50 * GIB - rest
    assert budget(step=60 * GIB, max_num_batched_tokens=4096) == 0, "never negative"
    unrecorded = budget(step=50 * GIB, max_num_batched_tokens=4096, graphs=False)
    assert unrecorded - less == recorded > 0


@pytest.mark.parametrize("most", [1, 2, 5, 64, 100, 256, 257])
def test_recorded_sizes_reach_the_most_rows_and_pad_little(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    padding = [next(size for size in sizes if size >= rows) - rows for rows in range(1, most + 1)]
    assert max(padding) < 32


def test_steps_of_thousands_of_rows_are_not_recorded() -> None:
    """Each size keeps its logits: for 4,096 rows of a vocabulary of 32,000 they would take 17 GB."""
    assert bucket_sizes(4096) == bucket_sizes(512)


def test_on_the_cpu_the_default_is_stated_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(max_model_len=10**9)
    monkeypatch.setattr(memory, "_free_host_memory", lambda: 100 * GIB)
    assert kv_cache_budget(config_of(), model, FakeBackend, 10**9) == CPU_DEFAULT_BYTES
    monkeypatch.setattr(memory, "_free_host_memory", lambda: 4 * GIB)
    assert kv_cache_budget(config_of(), model, FakeBackend, 10**9) == GIB
    assert kv_cache_budget(config_of(max_num_seqs=2), model, FakeBackend, 100) == 2 * 100 * 8
    assert kv_cache_budget(config_of(kv_cache_bytes="3GiB"), model, FakeBackend, 100) == 3 * GIB


def test_memory_is_accounted_in_blocks_and_bytes() -> None:
    engine, _ = make_engine(kv_cache_bytes=10 * 4 * 8, num_blocks=None, swap_space=str(3 * 4 * 8), max_model_len=32)
    usage = engine.stats().kv
    assert (usage.num_blocks, usage.block_size, usage.block_bytes) == (10, 4, 32)
    assert (usage.num_host_blocks, usage.num_free_host_blocks) == (3, 3)
    assert (usage.num_free_blocks, usage.num_cached_blocks, usage.num_used_blocks) == (10, 0, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("something else"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:  # noqa: FBT001 (a parameter)
    assert is_out_of_memory(error) is expected


def test_torch_says_so_in_these_words_when_the_cpu_has_no_room() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
