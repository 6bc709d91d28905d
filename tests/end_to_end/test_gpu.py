"""On a CUDA device: the dtype that ``auto`` picks, agreement with transformers, and memory sized from the device.

The tiny models are the ones of the CPU tests, so this needs nothing but torch, transformers and Folo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from agreement import assert_agrees
from tiny_models import ARCHITECTURES, VOCAB, save_model
from transformers import AutoModelForCausalLM

from folo_core import LLM, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (nox -s gpu)"),
]

PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13], [40], list(range(10, 40))]


def open_llm(folder: Path, **options: Any) -> LLM:
    settings = {"skip_tokenizer_init": True, "num_blocks": 64, "max_model_len": 64, "max_num_batched_tokens": 11}
    return LLM(str(folder), **(settings | {"max_num_seqs": 4} | options))


def test_auto_picks_bfloat16_from_compute_capability_8_and_float16_before(tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    llm = open_llm(tmp_path)
    expected = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    assert llm.engine.components.model_info.dtype == expected
    assert llm.engine.components.model_info.device.startswith("cuda")
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert all(len(output.outputs[0].token_ids) == 8 and output.error is None for output in outputs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_explicit_dtype_is_honoured(dtype: str, tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    assert open_llm(tmp_path, dtype=dtype).engine.components.model_info.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral"])
def test_greedy_tokens_are_transformers_own(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES[name]())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    llm = open_llm(tmp_path, dtype="float32")
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert_agrees(reference, prompt, output.outputs[0].token_ids, theirs[0, len(prompt) :].tolist())


def test_the_same_seed_gives_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    tokens = [
        [o.outputs[0].token_ids for o in open_llm(tmp_path, dtype="float32", device=device).generate(PROMPTS, params)]
        for device in ("cuda", "cpu")
    ]
    same = sum(a == b for a, b in zip(*tokens, strict=True))
    assert same >= len(PROMPTS) - 1, "logits differ in their last bits between devices, and rarely a token with them"


NEEDS_FLOAT8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)


def worst_choice(folder: Path, prompts: list[list[int]], outputs: list[Any]) -> float:
    """How far the worst token of all answers lies below the likeliest after the tokens before it.

    In standard deviations of float32's logits: a token at random is two or three below.
    """
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.error is None
        answer = torch.tensor(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
        below = logits.amax(-1) - logits.gather(-1, answer[:, None])[:, 0]
        worst = max(worst, float((below / logits.std(-1)).max()))
    return worst


@NEEDS_FLOAT8
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_keys_and_values_in_float8_choose_likely_tokens(name: str, graphs: bool, tmp_path: Path) -> None:  # noqa: FBT001
    save_model(tmp_path, ARCHITECTURES[name]())
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    block_bytes = []
    for kind in ("auto", "fp8"):
        llm = open_llm(tmp_path, dtype="bfloat16", kv_cache_dtype=kind, graphs=graphs)
        assert worst_choice(tmp_path, PROMPTS, llm.generate(PROMPTS, params)) < 0.5
        block_bytes.append(llm.engine.components.block_bytes)
        llm.engine.check_integrity()
    assert block_bytes[0] == 2 * block_bytes[1]


@NEEDS_FLOAT8
def test_keys_and_values_in_float8_are_swapped_and_shared(tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    prompts = [[7] * 16 + [(i * 7 + j * 3) % 90 + 3 for j in range(6 + i % 5)] for i in range(12)]
    llm = open_llm(
        tmp_path, dtype="bfloat16", kv_cache_dtype="fp8", block_size=4, max_num_seqs=12, max_num_batched_tokens=64,
        enable_prefix_caching=True, num_blocks=40, swap_space="64MiB", preemption="swap",
    )  # fmt: skip
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    assert llm.stats().num_swaps >= 1
    assert worst_choice(tmp_path, prompts, outputs) < 0.5
    llm.engine.check_integrity()


def test_the_cache_is_sized_from_the_devices_memory(tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES["llama"]())
    llm = open_llm(tmp_path, num_blocks=None, gpu_memory_utilization=0.5, max_num_seqs=4)
    assert llm.engine.components.kv_blocks == 4 * 64 // 16 + 1, "never more than the longest sequences need"
    assert llm.engine.components.model_info.vocab_size == VOCAB
