"""The demo model through the native kernels says what it says through torch's attention, layer by layer."""

from __future__ import annotations

import pytest

from folo_core import LLM, SamplingParams
from folo_kernels.library import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]


def test_tokens_and_prompt_logprobs_equal_those_through_torch() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    found = []
    for attention in ("native", "sdpa"):
        llm = LLM("demo", max_model_len=128, attention=attention)
        assert bool(llm.engine.components.executor.runner.model.stage_seconds()) is (attention == "native")
        # Alone, a prompt's step wants as many logits as it has tokens, in another order than the tokens'.
        found.append([llm.generate(prompt, params, use_tqdm=False)[0] for prompt in PROMPTS])
    for native, torch_own in zip(*found, strict=True):
        assert native.outputs[0].token_ids == torch_own.outputs[0].token_ids
        for one, other in zip(native.prompt_logprobs[1:], torch_own.prompt_logprobs[1:], strict=True):
            assert one.keys() == other.keys()
            for token in one:
                assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)
