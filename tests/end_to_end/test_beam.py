"""Beam search gives transformers' own hypotheses and scores: tiny models in every mode, and the demo model."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from agreement import dense_logits
from prompts import PROMPTS
from tiny_models import ARCHITECTURES, VOCAB, save_model
from transformers import AutoModelForCausalLM

from folo_beam import BeamParams
from folo_core import LLM

NAMES = ["llama", "qwen3", "gemma2", "gpt-neox"]
EOS = {"llama": [2], "qwen3": [2], "gemma2": [2, 9], "gpt-neox": [2]}
"""One architecture has two tokens that end an answer."""
NEW_TOKENS = 12
PER_CASE = 5
WIDTHS = (1, 2, 4, 8)
CASES = list(itertools.product(WIDTHS, (0.0, 0.6, 1.0, 2.0, -0.5), (True, False, "never")))
TIE = 1e-4


def prompts_of(name: str) -> list[list[list[int]]]:
    """Fifty prompts, in tens of batches of equal length."""
    rng = random.Random(name)
    return [[[rng.randrange(10, VOCAB) for _ in range(3 + 2 * i)] for _ in range(PER_CASE)] for i in range(10)]


def build(folder: Any, name: str) -> Any:
    """A tiny model whose end-of-sequence tokens are likely enough that answers end at every length."""
    save_model(folder, ARCHITECTURES[name]())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS[name]] *= 3.0
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS[name]
    model.save_pretrained(folder)
    return model


def reference(  # noqa: PLR0913, PLR0917 (one case)
    model: Any, prompts: list[list[int]], eos: list[int], width: int, penalty: float, early: Any, new: int = NEW_TOKENS
) -> list[list[tuple[list[int], float | None]]]:
    """Each prompt's ``width`` best hypotheses and their scores, by transformers; prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=eos,
        num_beams=width, num_return_sequences=width, return_dict_in_generate=True, output_scores=True,
        **({} if width == 1 else {"length_penalty": penalty, "early_stopping": early}),
    )  # fmt: skip
    answers = []
    for row in found.sequences[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in eos), len(row) - 1)
        answers.append(row[: end + 1])
    scores = [None] * len(answers) if width == 1 else found.sequences_scores.tolist()
    pairs = list(zip(answers, scores, strict=True))
    return [pairs[i : i + width] for i in range(0, len(pairs), width)]


def dense_score(model: Any, prompt: list[int], answer: list[int], penalty: float) -> float:
    logits = dense_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    picked = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return picked.sum().item() / len(answer) ** penalty


def assert_same(model: Any, prompt: list[int], penalty: float, ours: Any, theirs: Any) -> bool:
    """Assert equal hypotheses and scores, up to ties shown by a dense recomputation; return whether outright equal."""
    assert len(ours) == len(theirs)
    equal = True
    for completion, (tokens, score) in zip(ours, theirs, strict=True):
        exact = dense_score(model, prompt, completion.token_ids, penalty) if score is None else score
        assert completion.score == pytest.approx(exact, abs=TIE, rel=1e-5)
        if completion.token_ids != tokens:
            equal = False
            gap = dense_score(model, prompt, tokens, penalty) - dense_score(
                model, prompt, completion.token_ids, penalty
            )
            assert abs(gap) < TIE, f"{completion.token_ids} instead of {tokens}, {gap} below it"
    return equal


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hypotheses_and_scores_are_transformers_own(name: str, tmp_path: Any) -> None:
    model, batches, eos = build(tmp_path, name), prompts_of(name), EOS[name]
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, dtype="float32", num_blocks=600, block_size=4, max_model_len=64,
        max_num_seqs=64, max_num_batched_tokens=512,
    )  # fmt: skip
    work = [(prompt, case) for i, case in enumerate(CASES) for prompt in batches[(i + i // 10) % 10]]
    assert len({tuple(prompt) for prompt, _ in work}) == 50
    params = [
        BeamParams(width=width, length_penalty=penalty, early_stopping=early, n=width, max_tokens=NEW_TOKENS)
        for _, (width, penalty, early) in work
    ]
    outputs = llm.generate([prompt for prompt, _ in work], params)
    expected = [
        found
        for i, (width, penalty, early) in enumerate(CASES)
        for found in reference(model, batches[(i + i // 10) % 10], eos, width, penalty, early)
    ]
    equal = [
        assert_same(model, prompt, case[1], output.outputs, found)
        for (prompt, case), output, found in zip(work, outputs, expected, strict=True)
    ]
    assert sum(equal) >= len(work) - 3, "a tie is a rare thing"
    reasons = [completion.finish_reason for output in outputs for completion in output.outputs]
    assert min(reasons.count("stop"), reasons.count("length")) > len(reasons) // 20, "answers ended in both ways"
    lengths = {len(completion.token_ids) for output in outputs for completion in output.outputs}
    assert len(lengths) > NEW_TOKENS // 2, "answers ended at many lengths"


def test_the_modes_of_early_stopping_differ(tmp_path: Any) -> None:
    """What the comparison above rests on: every option changes some answer."""
    build(tmp_path, "llama")
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, dtype="float32", num_blocks=600, block_size=4, max_model_len=64)
    prompts = [prompt for batch in prompts_of("llama") for prompt in batch]

    def answers(**options: Any) -> list[Any]:
        params = BeamParams(**({"width": 4, "n": 4, "max_tokens": NEW_TOKENS} | options))
        return [[c.token_ids for c in output.outputs] for output in llm.generate(prompts, params)]

    found = [answers(early_stopping=early) for early in (True, False, "never")]
    assert found[0] != found[1] != found[2] != found[0]
    assert answers(length_penalty=2.0) != answers(length_penalty=0.0)


@pytest.mark.slow
def test_32_real_prompts_with_the_demo_model(demo: Any, request: Any) -> None:
    tokenizer = demo.get_tokenizer()
    prompts = sorted((tokenizer.encode(prompt) for prompt in PROMPTS[:32]), key=len)
    assert len(prompts) == 32
    params = BeamParams(width=4, n=4, max_tokens=24)
    outputs = demo.generate(prompts, params)
    model = request.getfixturevalue("reference")
    eos = list(demo.engine.inputs.info.eos_token_ids)
    expected = [
        found
        for start in range(0, 32, 8)
        for found in reference(model, prompts[start : start + 8], eos, 4, 1.0, early=False, new=24)
    ]
    equal = [
        assert_same(model, prompt, 1.0, output.outputs, found)
        for prompt, output, found in zip(prompts, outputs, expected, strict=True)
    ]
    assert sum(equal) >= 30, "a tie is a rare thing"
