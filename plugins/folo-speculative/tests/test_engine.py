"""Speculation in the engine: the same tokens, text and log probabilities as without it, whatever happens."""

from __future__ import annotations

import random

import attrs
import pytest
import torch
from speculation import Oracle, make_engine, peaked, run, sampler_of

from folo_core.errors import ConfigError, ParamsError
from folo_core.sampling.interface import Draft
from folo_core.sampling_params import RequestOutputKind, SamplingParams
from folo_core.testing.fakes import FakeModel
from folo_speculative import SpeculativeParams

PLAIN = {"max_tokens": 24, "temperature": 0.8}
CASES = {
    "greedy": {"temperature": 0.0},
    "random": {"seed": 3},
    "filters": {"seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    "min tokens": {"seed": 6, "min_tokens": 15, "stop_token_ids": list(range(20, 60)), "temperature": 1.5},
    "bad words": {"seed": 7, "bad_words": ["!", "AB", "CDE", "a", "b"], "temperature": 1.5},
    "bias": {"seed": 8, "logit_bias": {7: 4.0, 9: -100.0, 63: -50.0}},
    "allowed": {"seed": 9, "allowed_token_ids": [1, 2, 3, 5, 8, 63], "min_tokens": 4},
    "log probabilities": {"seed": 10, "logprobs": 3},
    "stop string": {"seed": 11, "stop": ["5", "QR", "0"], "temperature": 1.2},
    "stop string kept": {"seed": 12, "stop": ["A", "7"], "include_stop_str_in_output": True, "temperature": 1.2},
    "end of text": {"seed": 13, "logit_bias": {63: 4.0}},
    "past the end of text": {"seed": 14, "logit_bias": {63: 4.0}, "ignore_eos": True},
    "one token": {"seed": 15, "max_tokens": 1},
    "two tokens": {"seed": 16, "max_tokens": 2},
}


def prompt_of(number):
    rng = random.Random(number)
    return [rng.randrange(63) for _ in range(rng.randint(1, 12))]


def plain_answers(cases, **options):
    engine = make_engine(peaked(), **options)
    for number, (name, fields) in enumerate(cases.items()):
        engine.add_request(name, prompt_of(number), SamplingParams(**PLAIN | fields))
    return run(engine)


def seen(output):
    completion = output.outputs[0]
    assert output.error is None
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [{token: round(entry.logprob, 4) for token, entry in found.items()} for found in completion.logprobs]
    return completion.text, completion.token_ids, completion.finish_reason, completion.stop_reason, logprobs


def assert_same(oracle, cases, final, expected):
    for name in cases:
        assert seen(final[name]) == seen(expected[name]), name
        total = expected[name].outputs[0].cumulative_logprob
        assert final[name].outputs[0].cumulative_logprob == (None if total is None else pytest.approx(total, abs=1e-4))
    assert sorted(oracle.removed) == sorted(cases)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 26, "max_model_len": 40}, {"max_num_batched_tokens": 9, "max_num_seqs": 5}],
    ids=["room", "preemptions", "small steps"],
)
def test_every_parameter_gives_the_tokens_of_plain_decoding(options, caplog):
    expected = plain_answers(CASES)
    oracle = Oracle()
    oracle.answers = {name: output.outputs[0].token_ids for name, output in expected.items()}
    engine = make_engine(peaked(), plugins=[oracle], **options)
    for number, (name, fields) in enumerate(CASES.items()):
        params = SpeculativeParams(**PLAIN | fields, proposer="oracle", num_draft_tokens=5)
        engine.add_request(name, prompt_of(number), params)
    final = run(engine)
    assert_same(oracle, CASES, final, expected)
    metrics = [output.metrics for output in final.values()]
    drafted, accepted = sum(m.num_draft_tokens for m in metrics), sum(m.num_accepted_tokens for m in metrics)
    assert 20 < accepted < drafted - 20, "drafts were kept and drafts were rejected"
    if "num_blocks" in options:
        assert sum(m.num_preemptions for m in metrics) > 0
    assert "failed" not in caplog.text


def test_what_ends_an_answer_inside_a_run_of_kept_drafts_ends_it_there():
    """With a flawless oracle every stop is met inside such a run, in fewer steps than there are tokens."""
    expected = plain_answers(CASES)
    oracle = Oracle(error=0.0)
    oracle.answers = {name: [*o.outputs[0].token_ids, 1, 2, 3, 4] for name, o in expected.items()}
    engine = make_engine(peaked(), plugins=[oracle])
    for number, (name, fields) in enumerate(CASES.items()):
        engine.add_request(name, prompt_of(number), SpeculativeParams(**PLAIN | fields, proposer="oracle"))
    final = run(engine)
    for name in CASES:
        assert seen(final[name]) == seen(expected[name]), name
    reasons = {(seen(output)[2], type(seen(output)[3])) for output in final.values()}
    assert reasons == {("stop", int), ("stop", str), ("stop", type(None)), ("length", type(None))}
    assert engine.step_count < 20


def test_speculating_requests_and_plain_ones_share_steps_and_nothing_else():
    expected = plain_answers(CASES)
    oracle = Oracle()
    oracle.answers = {name: output.outputs[0].token_ids for name, output in expected.items()}
    engine = make_engine(peaked(), plugins=[oracle], max_num_seqs=32)
    for number, (name, fields) in enumerate(CASES.items()):
        if number % 2:
            engine.add_request(name, prompt_of(number), SamplingParams(**PLAIN | fields))
        else:
            engine.add_request(name, prompt_of(number), SpeculativeParams(**PLAIN | fields, proposer="oracle"))
    final = run(engine)
    for number, name in enumerate(CASES):
        assert seen(final[name]) == seen(expected[name]), name
        assert not number % 2 or final[name].metrics.acceptance_rate is None
    assert sum(output.metrics.num_accepted_tokens for output in final.values()) > 5


def test_n_grams_of_the_text_itself_are_drafted_and_kept():
    engine = make_engine()
    engine.add_request("a", [1, 2, 3], SpeculativeParams(temperature=0, max_tokens=60, ignore_eos=True))
    (output,) = run(engine).values()
    model, expected = FakeModel(), [1, 2, 3]
    for _ in range(60):
        expected.append(int(model.logits_after(expected).argmax()))
    assert output.outputs[0].token_ids == expected[3:]
    assert output.metrics.num_accepted_tokens > 20, "greedy decoding of a fake model goes round in loops"
    assert engine.step_count < 40


def test_streamed_pieces_grow_by_runs():
    expected = plain_answers({"greedy": CASES["greedy"]})["greedy"]
    oracle = Oracle(error=0.0)
    oracle.answers = {"greedy": expected.outputs[0].token_ids}
    engine = make_engine(peaked(), plugins=[oracle])
    params = SpeculativeParams(**PLAIN | CASES["greedy"], proposer="oracle", output_kind=RequestOutputKind.DELTA)
    engine.add_request("greedy", prompt_of(0), params)
    pieces = []
    while engine.has_unfinished_requests:
        pieces += [output.outputs[0] for output in engine.step()]
    assert [token for piece in pieces for token in piece.token_ids] == expected.outputs[0].token_ids
    assert "".join(piece.text for piece in pieces) == expected.outputs[0].text
    assert max(len(piece.token_ids) for piece in pieces) > 3


def test_guesses_that_fail_become_fewer_and_those_that_hold_more():
    class Recording(Oracle):
        def propose(self, metadata, max_tokens):
            self.asked.append(max_tokens)
            draft = super().propose(metadata, max_tokens)
            if self.always_wrong and draft.tokens.numel():
                draft.tokens.bitwise_xor_(1)
            return draft

    model = peaked()
    for always_wrong, expected in ((True, [8, 4, 2, 1, 1]), (False, [8, 8])):
        oracle = Recording(error=0.0)
        oracle.asked, oracle.always_wrong = [], always_wrong
        oracle.random.randint = lambda low, high: high
        plain = make_engine(peaked())
        plain.add_request("a", [1], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        oracle.answers = {"a": run(plain)["a"].outputs[0].token_ids}
        engine = make_engine(model, plugins=[oracle])
        engine.add_request(
            "a",
            [1],
            SpeculativeParams(temperature=0, max_tokens=40, ignore_eos=True, proposer="oracle", num_draft_tokens=8),
        )
        assert run(engine)["a"].outputs[0].token_ids == oracle.answers["a"]
        assert oracle.asked[: len(expected)] == expected


@pytest.mark.parametrize("error", [0, 1])
def test_a_proposer_that_fails_costs_speed_and_not_the_requests(error, caplog):
    class Failing(Oracle):
        def propose(self, metadata, max_tokens):
            if self.error:
                raise RuntimeError("no idea")
            return Draft(tokens=torch.zeros(5, 1))

    expected = plain_answers({"random": CASES["random"]})["random"]
    engine = make_engine(peaked(), plugins=[Failing(error)])
    engine.add_request("random", prompt_of(0), SpeculativeParams(**PLAIN | CASES["random"], proposer="oracle"))
    assert seen(run(engine)["random"]) == seen(expected)
    assert caplog.text.count("proposer 'oracle' failed") == 1


def test_a_bad_row_ends_its_request_alone():
    expected = plain_answers(CASES)
    oracle = Oracle(error=0.0)
    oracle.answers = {name: output.outputs[0].token_ids for name, output in expected.items()}
    model = peaked()
    poison = prompt_of(1) + oracle.answers["random"][:6]

    def edit(logits, pasts):
        for row, past in enumerate(pasts):
            if past == poison:
                logits[row] = float("nan")
        return logits

    model.edit_logits = edit
    engine = make_engine(model, plugins=[oracle], max_num_seqs=32)
    for number, (name, fields) in enumerate(CASES.items()):
        engine.add_request(name, prompt_of(number), SpeculativeParams(**PLAIN | fields, proposer="oracle"))
    final = run(engine)
    assert "largest logit is nan" in str(final.pop("random").error)
    for name, output in final.items():
        assert seen(output) == seen(expected[name])


def test_an_abort_returns_everything():
    draft = peaked()
    engine = make_engine(peaked(), draft=draft)
    params = SpeculativeParams(max_tokens=50, ignore_eos=True, proposer="draft-model", seed=1)
    for name in "ab":
        engine.add_request(name, [1, 2, 3], params)
    for _ in range(4):
        engine.step()
    assert any(s.draft_token_ids for request in engine.requests.values() for s in request.live)
    assert sampler_of(engine)._drawn.keys() == {"a", "b"}
    (aborted,) = engine.abort("a")
    assert aborted.outputs[0].finish_reason == "abort"
    final = run(engine)
    assert len(final["b"].outputs[0].token_ids) == 50
    assert not sampler_of(engine)._drawn
    side = sampler_of(engine)._proposers["draft-model"].model
    assert side._empty.pool.num_free == side._empty.pool.num_usable


@pytest.mark.parametrize("num_blocks", [256, 30])
@pytest.mark.parametrize("draft_seed", [0, 1])
def test_a_draft_model_changes_no_greedy_token(num_blocks, draft_seed):
    """Seed 0 is the main model itself, whose drafts are all kept; another one's are mostly not."""
    engine = make_engine(peaked(), draft=peaked(draft_seed), num_blocks=num_blocks, max_model_len=40)
    model = peaked()
    for n in range(6):
        params = SpeculativeParams(
            temperature=0, max_tokens=20, ignore_eos=True, proposer="draft-model", num_draft_tokens=4
        )
        engine.add_request(str(n), [n, 2 * n], params)
    engine.add_request(
        "sampled", [9], SpeculativeParams(seed=5, max_tokens=20, ignore_eos=True, proposer="draft-model")
    )
    final = run(engine)
    for n in range(6):
        expected = [n, 2 * n]
        for _ in range(20):
            expected.append(int(model.logits_after(expected).argmax()))
        assert final[str(n)].outputs[0].token_ids == expected[2:]
    metrics = [output.metrics for name, output in final.items() if name != "sampled"]
    drafted, accepted = sum(m.num_draft_tokens for m in metrics), sum(m.num_accepted_tokens for m in metrics)
    assert drafted > 50
    assert accepted == drafted if draft_seed == 0 else accepted < drafted / 2
    assert (sum(m.num_preemptions for m in metrics) > 0) == (num_blocks == 30)
    side = sampler_of(engine)._proposers["draft-model"].model
    side.check_integrity()
    assert side._empty.pool.num_free == side._empty.pool.num_usable
    whole = sum(range(2, 22)) * 6
    assert side.num_computed_tokens < whole / 2, "the draft model reads along; it does not read anew"


def test_drawn_drafts_do_not_depend_on_neighbours_or_preemption():
    def answers(numbers, **options):
        engine = make_engine(peaked(), draft=peaked(factor=2.5), **options)
        for n in numbers:
            params = SpeculativeParams(seed=n, max_tokens=16, ignore_eos=True, proposer="draft-model", top_p=0.95)
            engine.add_request(str(n), [n, 7], params)
        final = run(engine)
        return {name: output.outputs[0].token_ids for name, output in final.items()}, final

    together, final = answers(range(6))
    metrics = [output.metrics for output in final.values()]
    assert 0 < sum(m.num_accepted_tokens for m in metrics) < sum(m.num_draft_tokens for m in metrics)
    assert answers(range(5, -1, -1))[0] == together
    for n in range(3):
        assert answers([n])[0][str(n)] == together[str(n)]


def test_a_draft_model_is_opened_with_the_engine_and_judged_there():
    with pytest.raises(ConfigError, match="'draft' reads 30 tokens"):
        make_engine(draft=FakeModel(max_model_len=30))
    other = FakeModel(vocab_size=70)
    engine = make_engine(draft=other)
    assert sampler_of(engine)._proposers["draft-model"].model.vocab_size == 64


def test_several_answers_and_two_strategies_at_once_are_refused():
    engine = make_engine()
    with pytest.raises(ParamsError, match="speculation follows one answer"):
        engine.add_request("a", [1], SpeculativeParams(n=2))

    @attrs.frozen(slots=False, kw_only=True)
    class MoreParams(SpeculativeParams):
        pass

    with pytest.raises(ParamsError, match="MoreParams"):
        engine.add_request("a", [1], MoreParams())
