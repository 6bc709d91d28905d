"""Guidance by a second model gives what two dense transformers models give, token by token."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from agreement import TIE, dense_logits
from tiny_models import ARCHITECTURES, VOCAB, save_model
from transformers import AutoModelForCausalLM

from folo_core import LLM, SamplingParams
from folo_core.sampling_params import SamplingType
from folo_core.testing.builders import make_context, make_metadata
from folo_guidance import GuidanceParams

if TYPE_CHECKING:
    from pathlib import Path

NEW_TOKENS = 16
CASES = [(scale, plausibility) for scale in (0.0, 0.5, 1.5, 3.0) for plausibility in (0.0, 0.1, 0.5)]
SAMPLED: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 7, "min_p": 0.05}]


class Pair:
    """A main model and a guide of another architecture, in Folo and dense."""

    def __init__(self, folder: Path) -> None:
        folders = {name: str(folder / name) for name in ("llama", "gpt-neox")}
        for name, path in folders.items():
            save_model(path, ARCHITECTURES[name]())
        self.main, self.guide = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
            for path in folders.values()
        )
        # Blocks for a few requests at a time, so that some are computed anew.
        self.llm = LLM(
            folders["llama"], skip_tokenizer_init=True, dtype="float32", num_blocks=24, block_size=8, max_model_len=64,
            max_num_seqs=8, max_num_batched_tokens=16, plugins={"folo-guidance": {"guide": folders["gpt-neox"]}},
        )  # fmt: skip

    def combined(self, tokens: list[int], params: GuidanceParams) -> torch.Tensor:
        """The distribution after every token, as logits, float64 ``[len(tokens), vocab]``."""
        main, guide = (dense_logits(model, tokens).double().log_softmax(-1) for model in (self.main, self.guide))
        mixed = guide + params.scale * (main - guide)
        excluded = main.exp() < params.plausibility * main.exp().amax(-1, keepdim=True)
        return mixed.masked_fill(excluded, -torch.inf)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def generate(pair: Pair, params: list[GuidanceParams]) -> list[tuple[list[int], list[int], int]]:
    """Prompt, answer and number of preemptions for each request; all run together, beside plain ones."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 24))] for _ in params]
    plain = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS)] * 3
    outputs = pair.llm.generate(prompts + prompts[:3], params + plain)
    assert all(output.error is None for output in outputs)
    found = zip(prompts, outputs, strict=False)
    return [(prompt, output.outputs[0].token_ids, output.metrics.num_preemptions) for prompt, output in found]


def test_greedy_tokens_are_those_of_two_dense_models(pair: Pair) -> None:
    fields = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    params = [GuidanceParams(scale=s, plausibility=p, **fields) for s, p in CASES]
    unlike_main = equal = preemptions = 0
    for (prompt, answer, preempted), p in zip(generate(pair, params), params, strict=True):
        assert len(answer) == NEW_TOKENS
        logits = pair.combined([*prompt, *answer], p)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < TIE * max(1.0, p.scale), (
            "a token that is not the best, nor tied with it"
        )
        equal += answer == logits.argmax(1).tolist()
        own = dense_logits(pair.main, [*prompt, *answer])[len(prompt) - 1 : -1].argmax(1).tolist()
        unlike_main += answer != own
        preemptions += preempted
    assert equal >= len(params) - 1
    assert unlike_main >= len(params) // 2, "the guide made a difference"
    assert preemptions > 0


def test_sampled_tokens_are_the_plain_samplers_on_the_dense_combination(pair: Pair) -> None:
    sampler = make_context(vocab_size=VOCAB).plain_sampler(SamplingType.RANDOM)
    params = [
        GuidanceParams(scale=s, plausibility=p, seed=i, max_tokens=NEW_TOKENS, ignore_eos=True, **SAMPLED[i % 3])
        for i, (s, p) in enumerate(CASES)
    ]
    judged = differ = 0
    for (prompt, answer, _), p in zip(generate(pair, params), params, strict=True):
        logits = pair.combined([*prompt, *answer], p).float()
        for place, token in enumerate(answer):
            past = [*prompt, *answer[:place]]
            metadata = make_metadata([p], vocab_size=VOCAB, histories=[past])
            expected = int(sampler.step(logits[None, len(past) - 1].clone(), metadata).tokens)
            judged += 1
            differ += token != expected
    # A draw on the edge between two tokens may fall to either side when sums are taken in another order.
    assert judged == len(CASES) * NEW_TOKENS
    assert differ <= 2


def test_the_guide_s_blocks_come_back(pair: Pair) -> None:
    pair.llm.engine.step()
    guide = pair.llm.engine.executor.runner.stage.samplers["folo-guidance:guidance"].part._guide
    assert guide.num_computed_tokens > len(CASES) * NEW_TOKENS
    assert guide._empty.pool.num_free == guide._empty.pool.num_usable
    guide.check_integrity()
