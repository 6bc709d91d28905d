"""What candidates draw and how they are scored: each is a request by itself, and the ranking is a brute-force one's."""

from __future__ import annotations

import functools
import itertools
import math

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import assert_clean, make_engine, run
from folo_best_of import BestOfParams
from folo_core.plugins.manager import load_registry
from folo_core.sampling_params import SamplingParams
from folo_core.testing import strategies
from folo_core.testing.builders import make_context, make_metadata, make_request
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel
from folo_core.testing.harness import SamplerHarness

PROMPT = [5, 9, 2, 7, 1, 8, 3]
EOS = FAKE_VOCAB - 1


def ending_model(push: float = 3.0) -> FakeModel:
    """A fake model that ends its answers early, so that candidates have different lengths."""
    model = FakeModel()
    model.table[:, EOS] += push
    return model


def answers(output) -> list[tuple]:
    return [(a.index, a.token_ids, a.score, a.cumulative_logprob, a.finish_reason) for a in output.outputs]


def generate(params, *, model=None, prompt=PROMPT, **options):
    engine, _ = make_engine(ending_model() if model is None else model, **options)
    engine.add_request("a", prompt, params)
    output = run(engine)["a"]
    assert_clean(engine)
    assert output.error is None, output.error
    return output


@functools.cache
def sampler(name: str, vocab_size: int = FAKE_VOCAB):
    return load_registry().get("samplers", name).build(make_context(vocab_size=vocab_size))


def brute_force(model: FakeModel, params: SamplingParams, prompt=PROMPT) -> list[tuple]:
    """All candidates, best first: (index, tokens, log probability), drawn one row and one token at a time."""
    draw = sampler("random")
    found = []
    for index in range(params.best_of):
        tokens, score = [], torch.zeros(1)
        while len(tokens) < params.max_tokens and (not tokens or tokens[-1] != EOS):
            logits = model.logits_after([*prompt, *tokens])[None]
            metadata = make_metadata(
                [params], vocab_size=FAKE_VOCAB, sequence_indices=[index], histories=[[*prompt, *tokens]]
            )
            tokens.append(int(draw.step(logits.clone(), metadata).tokens))
            score += logits.log_softmax(1)[0, tokens[-1]]
        found.append((index, tokens, float(score)))
    return found


def ranked(found: list[tuple], length_penalty: float) -> list[tuple]:
    scored = [(tokens, score / len(tokens) ** length_penalty, index) for index, tokens, score in found]
    return sorted(scored, key=lambda candidate: (-candidate[1], candidate[2]))


@st.composite
def params_to_rank(draw) -> SamplingParams:
    best_of = draw(st.integers(2, 6))
    fields = {
        "n": draw(st.integers(1, best_of)),
        "best_of": best_of,
        "temperature": draw(st.sampled_from([0.3, 1.0, 2.0])),
        "top_k": draw(st.sampled_from([0, 5])),
        "top_p": draw(st.sampled_from([1.0, 0.8])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "max_tokens": draw(st.integers(1, 12)),
    }
    length_penalty = draw(st.sampled_from([None, 0.0, 1.0, 2.0, -1.0, 0.37]))
    return SamplingParams(**fields) if length_penalty is None else BestOfParams(**fields, length_penalty=length_penalty)


@settings(max_examples=60)
@given(params=params_to_rank())
def test_the_answers_are_those_of_a_brute_force_reference(params):
    model = ending_model()
    expected = ranked(brute_force(model, params), getattr(params, "length_penalty", 0.0))[: params.n]
    output = generate(params, model=model)
    assert [(a.token_ids, a.score) for a in output.outputs] == [(tokens, score) for tokens, score, _ in expected]
    assert [a.index for a in output.outputs] == list(range(params.n))


VARIED = [
    {},
    {"temperature": 0.8, "logprobs": 3},
    {"top_k": 7, "top_p": 0.9},
    {"min_p": 0.05, "temperature": 2.5},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"logit_bias": {4: 5.0, EOS: -2.0}, "min_tokens": 5},
    {"allowed_token_ids": [1, 2, 3, 4, EOS], "stop_token_ids": [3], "temperature": 2.0},
    {"bad_words": ["ab", "c"], "stop": ["7", "x!"]},
]


@pytest.mark.parametrize("fields", VARIED, ids=lambda fields: "-".join(fields) or "plain")
def test_each_candidate_is_what_a_request_by_itself_draws(fields):
    params = SamplingParams(n=5, seed=11, max_tokens=14, **fields)
    engine, _ = make_engine()
    engine.add_request("all", PROMPT, params)
    request = engine.requests["all"]
    for index in range(5):
        engine.add_request(f"{index}", PROMPT, attrs.evolve(params, n=1, logprobs=0))
        engine.requests[f"{index}"].live[0].index = index
    final = run(engine)
    candidates = {s.index: s for s in request.finished}
    assert sorted(candidates) == list(range(5))
    assert len({tuple(s.data.output_token_ids) for s in candidates.values()}) > 1
    for index, sequence in candidates.items():
        alone = final[f"{index}"].outputs[0]
        assert sequence.data.output_token_ids == alone.token_ids
        assert (sequence.status.finish_reason, sequence.stop_reason) == (alone.finish_reason, alone.stop_reason)
        if not fields.keys() & {"repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words"}:
            assert sequence.data.cumulative_logprob == pytest.approx(alone.cumulative_logprob, rel=1e-5)
    assert_clean(engine)


@settings(max_examples=40)
@given(
    plain=st.lists(
        strategies.sampling_params(temperature=0.8) | strategies.sampling_params(temperature=2.0),
        min_size=1,
        max_size=4,
    ),
    best_of=st.integers(2, 5),
    steps=st.integers(1, 5),
)
def test_in_one_batched_call_every_request_draws_what_the_random_sampler_draws(plain, best_of, steps):
    vocab_size = 37
    wide = [make_request(f"r{i}", attrs.evolve(p, n=best_of), prompt=range(1, 3 + i)) for i, p in enumerate(plain)]
    harness = SamplerHarness(sampler("fan-out", vocab_size), vocab_size)
    for request in wide:
        harness.add(request)
    outputs = [harness.step() for _ in range(steps)]
    assert {len(output.tokens) for output in outputs} == {best_of * len(wide)}
    for request, index in itertools.product(wide, range(best_of)):
        single = attrs.evolve(request.params, n=1)
        alone = make_request(request.request_id, single, prompt=request.prompt_token_ids)
        other = SamplerHarness(sampler("random", vocab_size), vocab_size)
        other.add(alone)
        alone.live[0].index = index
        for _ in range(steps):
            other.step()
        candidate = request.live[index]
        assert candidate.index == index
        assert candidate.data.output_token_ids == alone.live[0].data.output_token_ids


def test_scores_are_log_probabilities_at_temperature_1_and_cumulative_ones_agree():
    output = generate(SamplingParams(n=4, temperature=0.5, top_k=3, seed=2, max_tokens=6))
    model = ending_model()
    for answer in output.outputs:
        exact = 0.0
        for place, token in enumerate(answer.token_ids):
            logits = model.logits_after([*PROMPT, *answer.token_ids[:place]])
            exact += float(logits.log_softmax(0)[token])
        assert answer.score == pytest.approx(exact, rel=1e-5)
        assert answer.cumulative_logprob == pytest.approx(exact, rel=1e-5)


def test_scores_follow_the_logits_processors_and_reported_logprobs_do_not():
    params = SamplingParams(n=3, seed=2, max_tokens=6, allowed_token_ids=[4], logprobs=0)
    output = generate(params)
    assert [answer.token_ids for answer in output.outputs] == [[4] * 6] * 3
    assert [answer.score for answer in output.outputs] == [0.0] * 3, "the one token left is certain"
    assert all(answer.cumulative_logprob < -6 for answer in output.outputs)
    assert all(a.cumulative_logprob is not None for a in generate(attrs.evolve(params, logprobs=None)).outputs)


def test_of_equal_scores_the_candidate_drawn_first_comes_first():
    engine, _ = make_engine()
    engine.add_request("a", PROMPT, SamplingParams(n=3, best_of=5, max_tokens=4, allowed_token_ids=[4]))
    request = engine.requests["a"]
    ranks = []
    finish = engine.executor.rank
    engine.executor.rank = lambda r: ranks.append([s.index for s in finish(r)]) or finish(r)
    run(engine)
    assert ranks == [[0, 1, 2]]
    assert len(request.finished) == 5, "a candidate that can still tie is not cancelled"


def test_the_length_penalty_decides_between_short_and_long():
    model = FakeModel()
    model.table[:] = 0.0
    model.table[:, EOS] = math.log(FAKE_VOCAB)  # ends with probability 64/127
    params = BestOfParams(n=1, best_of=16, seed=4, max_tokens=20)
    lengths = {}
    for length_penalty in (-2.0, 0.0, 3.0):
        output = generate(attrs.evolve(params, length_penalty=length_penalty), model=model)
        lengths[length_penalty] = len(output.outputs[0].token_ids)
    assert lengths[-2.0] == lengths[0.0] == 1
    assert lengths[3.0] > 3


def test_one_candidate_of_best_of_params_is_a_random_request():
    params = {"seed": 3, "max_tokens": 9, "top_k": 9}
    single, plain = generate(BestOfParams(**params)), generate(SamplingParams(**params))
    assert single.outputs[0].token_ids == plain.outputs[0].token_ids
    assert single.outputs[0].score == pytest.approx(single.outputs[0].cumulative_logprob)
    assert plain.outputs[0].score is None


@pytest.mark.parametrize(("n", "kind"), [(4, "delta"), (2, "delta"), (2, "cumulative")])
def test_streams(n, kind):
    params = SamplingParams(n=n, best_of=4, seed=6, max_tokens=10, output_kind=kind)
    expected = generate(attrs.evolve(params, output_kind="final_only"), model=FakeModel())
    engine, _ = make_engine()
    engine.add_request("a", PROMPT, params)
    request = engine.requests["a"]
    texts, tokens, early, final = {}, {}, 0, None
    while engine.has_unfinished_requests:
        for output in engine.step():
            early += not output.finished
            final = output if output.finished else final
            for piece in output.outputs:
                texts[piece.index] = texts.get(piece.index, "") + piece.text
                tokens.setdefault(piece.index, []).extend(piece.token_ids)
    if kind == "delta" and n == 4:
        assert early >= 3
        by_index = {s.index: s for s in request.finished}
        assert sorted(tokens) == [0, 1, 2, 3]
        assert tokens == {index: s.data.output_token_ids for index, s in by_index.items()}
        assert sorted(texts.values()) == sorted(answer.text for answer in expected.outputs)
    else:
        assert (early > 0) == (kind == "cumulative")
        assert [a.token_ids for a in final.outputs] == [a.token_ids for a in expected.outputs]
        assert [a.text for a in final.outputs] == [a.text for a in expected.outputs]


def test_while_a_request_runs_its_outputs_name_each_candidate_by_its_sequence_index():
    engine, _ = make_engine(ending_model())
    engine.add_request("a", PROMPT, SamplingParams(n=5, seed=1, max_tokens=12))
    request, ended_late = engine.requests["a"], 0
    while engine.has_unfinished_requests:
        outputs = engine.step()
        by_index = {sequence.index: sequence.data.output_token_ids for sequence in request.get_seqs()}
        for answer in outputs[0].outputs if not outputs[0].finished else ():
            assert answer.token_ids == by_index[answer.index]
            ended_late += answer.finished and len(answer.token_ids) > 1
    assert ended_late
    assert [answer.index for answer in outputs[0].outputs] == [0, 1, 2, 3, 4]
