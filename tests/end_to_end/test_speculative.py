"""Speculation on real models: the tokens of plain greedy decoding, from n-grams and from a draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from agreement import assert_agrees, dense_logits
from prompts import PROMPTS
from tiny_models import ARCHITECTURES, VOCAB, save_model
from transformers import AutoModelForCausalLM

from folo_core import LLM, SamplingParams
from folo_core.execution.side_model import SideModel
from folo_speculative import SpeculativeParams

if TYPE_CHECKING:
    from pathlib import Path

NEW_TOKENS = 24


def assert_same(reference: Any, expected: list[Any], found: list[Any]) -> tuple[int, int]:
    """Assert that the answers are equal up to ties; return how many tokens were drafted and kept."""
    equal = [
        assert_agrees(reference, other.prompt_token_ids, one.outputs[0].token_ids, other.outputs[0].token_ids)
        for one, other in zip(found, expected, strict=True)
    ]
    assert sum(equal) >= len(equal) - 1, "a tie is a rare thing"
    metrics = [output.metrics for output in found]
    return sum(m.num_draft_tokens for m in metrics), sum(m.num_accepted_tokens for m in metrics)


def test_n_grams_change_no_greedy_token_of_the_demo_model(demo: Any, reference: Any) -> None:
    text = "The keeper of the lighthouse wrote down every ship that passed, and every ship that did not."
    chat = demo.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": f"Repeat the following text exactly:\n\n{text}"}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    prompts = [chat, *PROMPTS[:4]]
    expected = demo.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    found = demo.generate(prompts, SpeculativeParams(temperature=0, max_tokens=NEW_TOKENS, min_ngram=1))
    drafted, accepted = assert_same(reference, expected, found)
    assert found[0].metrics.acceptance_rate > 0.5, "it does repeat the text"
    assert 15 <= accepted < drafted - 5


def test_random_tokens_of_the_demo_model_are_the_same_with_the_same_seed(demo: Any) -> None:
    fields = [
        {"temperature": 0.7, "seed": 1, "top_p": 0.9},
        {"temperature": 0.3, "seed": 2, "repetition_penalty": 1.1, "logprobs": 2},
        {"temperature": 1.0, "seed": 3, "top_k": 5, "stop": ["."]},
        {"temperature": 0.2, "seed": 4, "min_p": 0.05, "min_tokens": 20},
    ]
    prompts = ["1, 2, 3, 4, 1, 2, 3, 4, 1, 2,", PROMPTS[3], "red, green, blue, red, green, blue, red,", PROMPTS[15]]
    expected = demo.generate(prompts, [SamplingParams(**f, max_tokens=NEW_TOKENS) for f in fields])
    found = demo.generate(prompts, [SpeculativeParams(**f, max_tokens=NEW_TOKENS, min_ngram=1) for f in fields])
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(expected, found, strict=True)]
    assert sum(same) >= 3, "logits differ in their last bits with the number of rows, and rarely a token with them"
    drafted, accepted = (
        sum(getattr(output.metrics, name) for output in found) for name in ("num_draft_tokens", "num_accepted_tokens")
    )
    assert 0 < accepted < drafted


@pytest.mark.slow
def test_the_demo_model_drafts_for_itself() -> None:
    llm = LLM(
        "demo", dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_bytes="64MiB",
        plugins={"folo-speculative": {"draft_model": "demo"}},
    )  # fmt: skip
    expected = llm.generate(PROMPTS[:4], SamplingParams(temperature=0, max_tokens=16))
    found = llm.generate(PROMPTS[:4], SpeculativeParams(temperature=0, max_tokens=16, proposer="draft-model"))
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    sampled = SpeculativeParams(temperature=0.9, top_p=0.9, seed=1, max_tokens=16, proposer="draft-model")
    found += llm.generate(PROMPTS[:4], sampled)
    drafted, accepted = (
        sum(getattr(output.metrics, name) for output in found) for name in ("num_draft_tokens", "num_accepted_tokens")
    )
    assert accepted > 0.95 * drafted > 50, "it agrees with itself"


@pytest.mark.parametrize("draft", ["llama", "gemma3", "gpt2", "deepseek-v3"])
def test_a_draft_model_of_any_architecture_reads_along_as_transformers_reads(draft: str, tmp_path: Path) -> None:
    save_model(tmp_path / "main", ARCHITECTURES["llama"]())
    save_model(tmp_path / "draft", ARCHITECTURES[draft]())
    dense, own = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (tmp_path / "draft", tmp_path / "main")
    )
    llm = LLM(
        str(tmp_path / "main"), skip_tokenizer_init=True, dtype="float32", num_blocks=40, block_size=8,
        max_model_len=64, max_num_seqs=4, plugins={"folo-speculative": {"draft_model": str(tmp_path / "draft")}},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 5, 12, 20, 31)]
    expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    found = llm.generate(prompts, SpeculativeParams(temperature=0, max_tokens=16, proposer="draft-model"))
    drafted, accepted = assert_same(own, expected, found)
    assert accepted == drafted if draft == "llama" else accepted < drafted
    part = llm.engine.executor.runner.stage.samplers["folo-speculative:speculative"].part
    assert_reads(part._proposers["draft-model"].model, dense, prompts)


def assert_reads(side: SideModel, dense: Any, prompts: list[list[int]]) -> None:
    """The side model's logits are the dense model's, also where it reads on, back and from another's blocks."""
    for cut in (1, 3, 2, 30):
        histories = [prompt[:cut] for prompt in prompts]
        exact = torch.stack([dense_logits(dense, history)[-1] for history in histories])
        assert torch.allclose(side.logits(range(len(prompts)), histories), exact, atol=2e-4)
    longest = prompts[-1]
    before = side.num_computed_tokens
    fork = side.logits(["fork"], [[*longest[:20], 7]])
    assert torch.allclose(fork[0], dense_logits(dense, [*longest[:20], 7])[-1], atol=2e-4)
    assert side.num_computed_tokens == before + 1
    assert torch.allclose(side.logits([4], [longest])[0], dense_logits(dense, longest)[-1], atol=2e-4)
    side.check_integrity()
