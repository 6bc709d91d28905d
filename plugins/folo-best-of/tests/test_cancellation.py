"""Candidates that cannot win any more are cancelled, and nobody can tell from the answers."""

from __future__ import annotations

import functools

import attrs
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engines import assert_clean, make_engine, run
from folo_best_of import BestOfParams
from folo_core.plugins import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import ObserverSpec
from folo_core.sampling_params import SamplingParams
from folo_core.sequence import SequenceStatus
from folo_core.testing.builders import make_context, make_metadata, make_request
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel

EOS = FAKE_VOCAB - 1


class Prunings:
    """Counts the sequences that a strategy drops, and the rows that are run."""

    __name__ = "test-prunings"

    def __init__(self) -> None:
        self.pruned = self.rows = self.emptied = 0

    def on_step(self, record) -> None:
        self.rows += record.num_seqs

    def on_branches(self, record) -> None:
        self.pruned += len(record.pruned)
        self.emptied += not record.rows

    @hookimpl
    def folo_observers(self):
        return [ObserverSpec(name="test", help="for tests", factory=lambda _: self)]


def ending_model(push: float, sharpness: float = 1.0) -> FakeModel:
    """A model whose answers end early, the surer of its tokens the larger ``sharpness``."""
    model = FakeModel()
    model.table *= sharpness
    model.table[:, EOS] += push
    return model


def generate(requests, push: float, sharpness: float = 1.0, **options) -> tuple[dict, Prunings]:
    seen = Prunings()
    engine, _ = make_engine(ending_model(push, sharpness), plugins=[seen], **options)
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    final = run(engine, most_steps=5000)
    assert_clean(engine)
    return {
        name: [(a.token_ids, a.text, a.score, a.cumulative_logprob, a.finish_reason) for a in output.outputs]
        for name, output in final.items()
    }, seen


@st.composite
def wide_params(draw) -> BestOfParams:
    best_of = draw(st.sampled_from([2, 4, 6]))
    return BestOfParams(
        n=draw(st.sampled_from([1, best_of // 2, best_of - 1])),
        best_of=best_of,
        length_penalty=draw(st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.3, 1e-17, 10.0, -10.0])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 2])),
        min_tokens=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(3, 24)),
        logprobs=draw(st.sampled_from([None, 1])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def test_answers_are_the_same_with_and_without_cancellation():
    cancelled = []

    @settings(max_examples=60)
    @given(
        params=st.lists(wide_params(), min_size=1, max_size=3),
        push=st.sampled_from([2.0, 4.0]),
        sharpness=st.sampled_from([3.0, 1.0]),
        num_blocks=st.sampled_from([48, 512]),
    )
    def check(params, push, sharpness, num_blocks):
        found = {}
        for early_stop in (True, False):
            asked = {
                f"r{i}": ([3 + i, 7, 1, 9, 2], attrs.evolve(p, early_stop=early_stop)) for i, p in enumerate(params)
            }
            found[early_stop], seen = generate(
                asked, push, sharpness, num_blocks=num_blocks, max_num_seqs=12, max_model_len=40
            )
            assert early_stop or not seen.pruned
            if early_stop:
                cancelled.append(seen.pruned)
                event(f"cancelled: {min(seen.pruned, 3)}")
        assert found[True] == found[False]

    check()
    assert sum(count > 0 for count in cancelled) > len(cancelled) / 10, "cancellation happens"


@functools.cache
def best_of_sampler():
    return load_registry().get("samplers", "best-of").build(make_context(vocab_size=8))


log_probabilities = st.integers(0, 200).map(lambda eighths: -eighths / 8)


@settings(max_examples=300)
@given(
    length_penalty=st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.3, 1e-17, 10.0, -10.0]),
    ended=st.lists(st.tuples(log_probabilities, st.integers(1, 12)), min_size=1, max_size=4),
    n=st.integers(1, 4),
    now=st.tuples(log_probabilities, st.integers(1, 10)),
    taken_over=st.integers(0, 3),
)
def test_exactly_those_are_cancelled_that_no_continuation_would_save(length_penalty, ended, n, now, taken_over):
    longest = taken_over + 12
    params = BestOfParams(n=n, best_of=6, length_penalty=length_penalty, max_tokens=longest)
    request = make_request("a", params)
    for number, (score, length) in enumerate(ended):
        sequence = request.open_sequence(number)
        sequence.data.output_token_ids += [1] * (taken_over + length)
        sequence.score, sequence.tag = score, 1 + taken_over
        sequence.transition(SequenceStatus.RUNNING)
        request.close_sequence(sequence, SequenceStatus.FINISHED_STOPPED)
    score, length = now
    metadata = make_metadata(
        [params], vocab_size=8, request_ids=["a"], prompt_lengths=[3],
        histories=[[1] * (3 + taken_over + length)], scores=[score], tags=[1 + taken_over],
    )  # fmt: skip
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 5] = 2.0  # certain, so the score stays
    sampler = best_of_sampler()
    sampler.add_request(request)
    kept = len(sampler.step(logits, metadata).parents)
    sampler.remove_request("a")
    assert [sequence.score for sequence in request.finished] == [score for score, _ in ended]
    best = max(score / possible**length_penalty for possible in range(length + 1, 13))
    finished = sorted((score / length**length_penalty for score, length in ended), reverse=True)
    if len(finished) < n:
        assert kept
    elif best != pytest.approx(finished[n - 1], rel=1e-6):
        assert kept == (best > finished[n - 1])
    elif best >= finished[n - 1]:
        assert kept


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_cancellation_saves_work(length_penalty):
    params = BestOfParams(n=1, best_of=8, length_penalty=length_penalty, seed=1, max_tokens=24, temperature=2.0)
    kept, without = (generate({"a": ([1, 2, 3], attrs.evolve(params, early_stop=stop))}, 3.0) for stop in (True, False))
    assert kept[0] == without[0]
    assert kept[1].pruned > 0
    assert without[1].pruned == 0
    assert kept[1].rows < without[1].rows


def test_plain_params_cancel_too_and_the_last_candidates_may_all_be_cancelled_at_once():
    emptied = 0
    for seed in range(12):
        fields = {"n": 1, "best_of": 4, "seed": seed, "max_tokens": 200, "temperature": 1.5}
        answers, seen = generate({"a": ([1, 2, 3], SamplingParams(**fields))}, 3.0)
        everything, _ = generate({"a": ([1, 2, 3], BestOfParams(**fields, early_stop=False))}, 3.0)
        assert answers == everything
        assert seen.pruned
        emptied += seen.emptied
    assert emptied > 3


def test_nothing_is_cancelled_where_all_are_returned():
    _, seen = generate({"a": ([1, 2, 3], SamplingParams(n=6, seed=1, max_tokens=30, temperature=2.0))}, 3.0)
    assert seen.pruned == 0
    _, seen = generate({"a": ([1, 2, 3], SamplingParams(n=1, best_of=6, seed=1, max_tokens=30, temperature=2.0))}, 3.0)
    assert seen.pruned > 0


def test_a_candidate_that_can_only_draw_level_goes_on():
    model = FakeModel()
    model.table[:] = -1e9
    model.table[:, [4, EOS]] = 0.0  # a coin: go on, or end; after that, token 4 is certain
    model.table[:, 4] = 0.0

    def certain_after_the_first(logits, pasts):
        for row, past in enumerate(pasts):
            if len(past) > 3:
                logits[row, EOS] = -1e9
        return logits

    model.edit_logits = certain_after_the_first
    seen = Prunings()
    engine, _ = make_engine(model, plugins=[seen])
    engine.add_request("a", [1, 2, 3], SamplingParams(n=1, best_of=8, seed=3, max_tokens=6))
    request = engine.requests["a"]
    answer = run(engine)["a"].outputs[0]
    ended = {s.index: s for s in request.finished}
    assert len(ended) == 8, "all have probability 1/2"
    assert seen.pruned == 0
    assert {len(s.data.output_token_ids) for s in ended.values()} == {1, 6}
    assert answer.token_ids == ended[0].data.output_token_ids, "of equal ones, the first"
