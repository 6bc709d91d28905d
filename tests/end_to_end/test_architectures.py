"""Every family of models through the whole engine: greedy tokens and log probabilities are transformers' own."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from agreement import assert_agrees, dense_logits, reference_tokens
from tiny_models import ARCHITECTURES, VOCAB, save_model
from transformers import AutoModelForCausalLM

from folo_core import LLM, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

NEW_TOKENS = 14


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1, 3, 7, 12, 20, 31, 5, 16)]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_tokens_and_logprobs_are_transformers_own(name: str, prompts: list[list[int]], tmp_path: Path) -> None:
    save_model(tmp_path, ARCHITECTURES[name]())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    # Blocks for about half of what the prompts need, chunks smaller than most prompts, and a wait for places.
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, dtype="float32", num_blocks=10, block_size=8, max_model_len=64,
        max_num_seqs=5, max_num_batched_tokens=11, max_logprobs=-1,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    together = llm.generate(prompts, params)
    assert sum(output.metrics.num_preemptions for output in together) >= 1
    equal = 0
    for prompt, output in zip(prompts, together, strict=True):
        completion = output.outputs[0]
        equal += assert_agrees(reference, prompt, completion.token_ids, reference_tokens(reference, prompt, NEW_TOKENS))
        assert_logprobs(reference, prompt, completion)
    assert equal >= len(prompts) - 1
    assert [llm.generate(p, params)[0].outputs[0].token_ids for p in prompts[:3]] == [
        output.outputs[0].token_ids for output in together[:3]
    ]


def assert_logprobs(reference: Any, prompt: list[int], completion: Any) -> None:
    """Each sampled token's log probability is the dense model's, within 1e-4."""
    exact = dense_logits(reference, [*prompt, *completion.token_ids]).log_softmax(-1)
    for place, entry in enumerate(completion.logprobs):
        token = completion.token_ids[place]
        assert entry[token].logprob == pytest.approx(exact[len(prompt) - 1 + place, token].item(), abs=1e-4)


def test_there_are_more_than_nine() -> None:
    assert len(ARCHITECTURES) >= 9
