"""On a CUDA device: swapping is exact and asynchronous, memory is measured, and running out of it is survived."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import ARCHITECTURES, save_model
from transformers import LlamaConfig

from folo_attention.sdpa import SdpaBackend
from folo_core import LLM, SamplingParams
from folo_core.attention.interface import KVCacheSpec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (nox -s gpu)"),
]

DEVICE = torch.device("cuda", 0)
MIB = 2**20


def filled_backend(num_blocks: int, num_host_blocks: int, *, heads: int = 8, layers: int = 4) -> SdpaBackend:
    backend = SdpaBackend()
    specs = [KVCacheSpec(num_kv_heads=heads, head_size=64, dtype=torch.bfloat16) for _ in range(layers)]
    backend.allocate(specs, num_blocks, 16, DEVICE)
    backend.allocate_host(num_host_blocks)
    for cache in (*backend._keys, *backend._values):
        cache[:-1].normal_()
    return backend


def caches(backend: SdpaBackend) -> list[torch.Tensor]:
    return [cache.clone() for cache in (*backend._keys, *backend._values)]


def big_model(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return save_model(folder, config, dtype=torch.bfloat16)


# First: what another test leaves to be collected later would give the step room.
def test_a_step_that_the_device_has_no_room_for_is_tried_again_in_pieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(
        str(big_model(tmp_path)), skip_tokenizer_init=True, kv_cache_bytes="512MiB", max_model_len=8192,
        max_num_batched_tokens=16384, max_num_seqs=8,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [5 + i] * 4000} for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + 192 * MIB
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        outputs = llm.generate(prompts, params)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "a step of 16000 tokens ran out of memory" in caplog.text
    assert llm.engine.budget.max_num_batched_tokens < 16384, "steps were cut"
    assert [output.error for output in outputs] == [None] * 4
    same = sum(a == o.outputs[0].token_ids for a, o in zip(expected, outputs, strict=True))
    assert same >= 3, "other chunks, so rarely another token"
    llm.engine.check_integrity()


def test_a_round_trip_over_the_host_changes_no_bit() -> None:
    backend = filled_backend(64, 40)
    before = caches(backend)
    blocks, hosts = [3, 9, 10, 11, 40, 63], [7, 8, 9, 1, 30, 2]
    backend.swap_out(blocks, hosts)
    backend.zero_blocks(blocks)  # at once, while the copies may still be under way
    assert not backend._keys[0][3 * 16 : 4 * 16].any()
    backend.swap_in(hosts, blocks)
    assert all(torch.equal(now, then) for now, then in zip(caches(backend), before, strict=True))


def test_copies_to_the_host_do_not_hold_up_the_caller() -> None:
    backend = filled_backend(4096, 4096, heads=8, layers=8)
    blocks = list(range(1, 4096))
    backend.swap_out(blocks[:8], blocks[:8])
    torch.cuda.synchronize()
    backend.swap_out(blocks, blocks)
    still_copying = not backend._host._stream.query()
    torch.cuda.synchronize()
    assert still_copying, f"{len(blocks) * backend._host.block_bytes / MIB:.0f} MiB were on their way"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preempted_requests_come_back_from_the_host(dtype: str, tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    prompts = [[(i * 7 + j * 3) % 90 + 3 for j in range(6 + i % 5)] for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found: dict[bool, Any] = {}
    for short in (False, True):
        memory = {"num_blocks": 40, "swap_space": "64MiB", "preemption": "swap"} if short else {"num_blocks": 200}
        llm = LLM(
            str(tmp_path), skip_tokenizer_init=True, dtype=dtype, block_size=4, max_model_len=64, max_num_seqs=12,
            **memory,
        )  # fmt: skip
        outputs = llm.generate(prompts, params)
        assert [output.error for output in outputs] == [None] * len(prompts)
        found[short] = [output.outputs[0].token_ids for output in outputs]
        llm.engine.check_integrity()
    assert llm.stats().num_swaps >= 3
    same = sum(a == b for a, b in zip(found[False], found[True], strict=True))
    assert same >= len(prompts) - 2, "batches differ, so logits may differ in their last bits, and rarely a token"


def test_the_cache_takes_what_the_largest_step_leaves(tmp_path: Path) -> None:
    used_before = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    llm = LLM(
        str(big_model(tmp_path)), skip_tokenizer_init=True, gpu_memory_utilization=0.5, max_model_len=8192,
        max_num_seqs=4096, max_num_batched_tokens=16384,
    )  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    kv = llm.stats().kv
    assert kv.num_blocks * kv.block_bytes > 0.3 * total, "most of the half goes to keys and values"
    assert total - free <= 0.5 * total + used_before
    prompts = [{"prompt_token_ids": [5 + i] * 8000} for i in range(4)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert [output.error for output in outputs] == [None] * 4
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total + used_before, "the largest steps stay within the share"
