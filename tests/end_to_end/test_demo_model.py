"""The demo model gives what transformers gives: alone, batched, staggered, streamed, and with log probabilities."""

from __future__ import annotations

import random
from typing import Any

import pytest
from agreement import assert_agrees, dense_logits, reference_tokens
from prompts import PROMPTS

from folo_core import SamplingParams

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def prompts(demo: Any) -> list[list[int]]:
    tokenizer = demo.get_tokenizer()
    assert len(set(PROMPTS)) == 64
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [reference_tokens(reference, prompt, NEW_TOKENS) for prompt in prompts]


def assert_all_agree(reference: Any, prompts: Any, outputs: Any, expected: Any) -> None:
    equal = [
        assert_agrees(reference, prompt, ours, theirs)
        for prompt, ours, theirs in zip(prompts, outputs, expected, strict=True)
    ]
    assert sum(equal) >= 62, "a tie is a rare thing"


@pytest.mark.slow
def test_64_prompts_alone(demo: Any, reference: Any, prompts: Any, expected: Any) -> None:
    outputs = [demo.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert_all_agree(reference, prompts, outputs, expected)


@pytest.mark.slow
def test_64_prompts_batched_with_staggered_arrivals(demo: Any, reference: Any, prompts: Any, expected: Any) -> None:
    engine, order = demo.engine, list(range(64))
    random.Random(0).shuffle(order)
    outputs: dict[str, list[int]] = {}
    widest = 0
    while order or engine.has_unfinished_requests:
        for place in [order.pop() for _ in range(min(3, len(order)))]:
            engine.add_request(str(place), prompts[place], GREEDY)
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = output.outputs[0].token_ids
        widest = max(widest, engine.state.num_running_seqs)
        engine.check_integrity()
    assert widest >= 12, "requests really shared steps"
    assert_all_agree(reference, prompts, [outputs[str(place)] for place in range(64)], expected)


def test_log_probabilities_are_within_1e_4(demo: Any, reference: Any, prompts: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=0)
    worst = 0.0
    for prompt, output in zip(prompts[:12], demo.generate(prompts[:12], params), strict=True):
        completion = output.outputs[0]
        exact = dense_logits(reference, [*prompt, *completion.token_ids]).log_softmax(-1)
        for place, token in enumerate(prompt[1:]):
            worst = max(worst, abs(output.prompt_logprobs[place + 1][token].logprob - exact[place, token].item()))
        for place, entries in enumerate(completion.logprobs, start=len(prompt) - 1):
            assert len(entries) >= 3
            worst = max(worst, *(abs(e.logprob - exact[place, token].item()) for token, e in entries.items()))
    assert worst < 1e-4


def test_the_same_seed_gives_the_same_tokens_alone_batched_and_in_any_order(demo: Any) -> None:
    rng = random.Random(0)
    cases = [
        (
            PROMPTS[i],
            SamplingParams(temperature=0.9, top_p=[1.0, 0.9][i % 2], top_k=[0, 40][i % 3 == 0], seed=i, max_tokens=10),
        )
        for i in range(8)
    ]
    alone = [demo.generate(*case)[0].outputs[0].token_ids for case in cases]
    for _ in range(2):
        order = rng.sample(range(8), 8)
        outputs = demo.generate([cases[i][0] for i in order], [cases[i][1] for i in order])
        assert [o.outputs[0].token_ids for o in outputs] == [alone[i] for i in order]
    other = demo.generate(PROMPTS[0], SamplingParams(temperature=0.9, seed=99, max_tokens=10))[0]
    assert other.outputs[0].token_ids != alone[0]


def test_streamed_text_is_the_tokenizers_own(demo: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for prompt in ("Write an emoji party: 🎉🎊", "Bonjour, ça va? Très bien,", "日本語で"):
        pieces = [out.outputs[0] for out in demo.stream(prompt, params)]
        tokens = [token for piece in pieces for token in piece.token_ids]
        text = "".join(piece.text for piece in pieces)
        assert len(tokens) == 24
        assert text == demo.generate(prompt, params)[0].outputs[0].text
        ids = demo.get_tokenizer().encode(prompt)
        assert (demo.get_tokenizer().decode(ids) + text).startswith(
            demo.get_tokenizer().decode([*ids, *tokens], skip_special_tokens=True).rstrip("\ufffd")
        )


def test_chat_answers_sensibly(demo: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = demo.chat(question, SamplingParams(temperature=0, max_tokens=24))
    assert "Paris" in output.outputs[0].text
    assert output.prompt.endswith("<|im_start|>assistant\n")


def test_every_field_of_the_parameters_at_once_in_a_mixed_batch(demo: Any) -> None:
    """Rows with all kinds of parameters run in one batch, and the greedy ones among them are as alone."""
    plain = SamplingParams(temperature=0, max_tokens=8)
    rich = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=1, max_tokens=8),
        SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, seed=2, max_tokens=8),
        SamplingParams(logit_bias={100: 5.0, 200: -100.0}, seed=3, max_tokens=8),
        SamplingParams(allowed_token_ids=[28, 30, 260], seed=4, max_tokens=8),
        SamplingParams(bad_words=["the", "a"], temperature=0, max_tokens=8),
        SamplingParams(min_tokens=6, stop_token_ids=[30], temperature=0, max_tokens=8),
        SamplingParams(stop=["\n", "."], temperature=0, max_tokens=8, include_stop_str_in_output=True),
    ]
    alone = demo.generate(PROMPTS[0], plain)[0].outputs[0].token_ids
    outputs = demo.generate([PROMPTS[0]] * 9, [plain, *rich, plain])
    assert outputs[0].outputs[0].token_ids == outputs[8].outputs[0].token_ids == alone
    assert set(outputs[4].outputs[0].token_ids) <= {28, 30, 260}
    assert not {" the", " a", "the", "a"} & {demo.get_tokenizer().decode([t]) for t in outputs[5].outputs[0].token_ids}
    assert len(outputs[6].outputs[0].token_ids) >= 6
    assert outputs[7].outputs[0].text[-1] in "\n." or outputs[7].outputs[0].finish_reason == "length"


def test_everything_is_returned_in_the_end(demo: Any) -> None:
    demo.engine.step()
    demo.engine.check_integrity()
    pool = demo.engine.state.kv.pool
    assert pool.num_free == pool.num_usable
