"""``deterministic=True`` on the demo model: the same bits alone, batched, in chunks, on one thread and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import PROMPTS

from folo_core import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=4, logprobs=2, ignore_eos=True)
SMALL = {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 16}
"""Options that cut every longer prompt."""


def load(**options: Any) -> Any:
    return LLM("demo", **({"dtype": "float32", "device": "cpu", "max_model_len": 512, "max_num_seqs": 16} | options))


@pytest.fixture(scope="module")
def steady() -> Any:
    return load(deterministic=True)


@pytest.fixture(scope="module")
def jobs(steady: Any) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 140 tokens, greedy, and two of them sampled too."""
    tokens = [token for prompt in PROMPTS for token in steady.get_tokenizer().encode(prompt)]
    prompts = [tokens[start : start + length] for start, length in enumerate((1, 20, 64, 140))]
    return [(prompt, GREEDY) for prompt in prompts] + [(prompt, SAMPLED) for prompt in prompts[1:3]]


def answers(llm: Any, jobs: Any) -> list[Any]:
    outputs = llm.generate([prompt for prompt, _ in jobs], [params for _, params in jobs], use_tqdm=False)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]


def alone(llm: Any, jobs: Any) -> list[Any]:
    return [answers(llm, [job])[0] for job in jobs]


@pytest.mark.slow
def test_alone_batched_and_in_another_order(steady: Any, jobs: Any) -> None:
    wanted = alone(steady, jobs)
    assert answers(steady, jobs) == wanted
    assert answers(steady, jobs[::-1]) == wanted[::-1]


@pytest.mark.slow
def test_in_chunks_and_on_two_threads(steady: Any, jobs: Any) -> None:
    wanted, threads = answers(steady, jobs), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        chunked = load(deterministic=True, **SMALL)
        assert answers(chunked, jobs[3:] + jobs[:3]) == wanted[3:] + wanted[:3]
        torch.set_num_threads(1)
        assert answers(chunked, jobs) == wanted
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_default_mode_does_differ(demo: Any, jobs: Any) -> None:
    """Else the tests above would prove nothing."""
    together = answers(demo, jobs)
    assert any(one != other for one, other in zip(alone(demo, jobs), together, strict=True))
