"""Phrases that must appear do, at the least cost in probability that the width can find."""

from __future__ import annotations

import itertools

import attrs
import pytest
from folo_beam_references import contains, every_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import assert_clean, make_engine, make_llm, run
from folo_beam import BeamParams
from folo_beam import sampler as sampler_module
from folo_beam.constraints import Banks, _deal
from folo_core.errors import ParamsError
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel

PROMPT = [1, 2, 3]
MODEL = FakeModel()
TINY = FakeModel(vocab_size=5)


def answer(params, prompt=PROMPT, model=MODEL, **options):
    engine, _ = make_engine(model, **options)
    engine.add_request("r", prompt, params)
    found = run(engine)["r"]
    assert_clean(engine)
    assert found.error is None
    return found.outputs


phrases = st.lists(
    st.lists(st.integers(0, FAKE_VOCAB - 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3, unique=True
)


@settings(max_examples=40, deadline=None)
@given(phrases, st.integers(1, 6), st.integers(0, 4), st.sampled_from([True, False, "never"]))
def test_every_phrase_appears_in_every_answer(wanted, width, spare, early):
    room = sum(map(len, wanted)) + spare
    params = BeamParams(width=width, n=width, max_tokens=room, must_include=wanted, early_stopping=early)
    found = answer(params)
    assert found
    for completion in found:
        assert all(contains(completion.token_ids, phrase) for phrase in wanted)


def lie_apart(wanted):
    """Whether no phrase can begin within another: room is kept for each in full, so overlaps are not counted on."""
    pairs = itertools.permutations(wanted, 2)
    return not any(one[-n:] == other[:n] for one, other in pairs for n in range(1, min(len(one), len(other)) + 1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=2, unique=True)
    .filter(lambda wanted: sum(map(len, wanted)) <= 4)
    .filter(lie_apart),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_a_wide_search_finds_the_best_of_all_answers(wanted, prompt):
    params = BeamParams(width=128, n=1, max_tokens=4, must_include=wanted, length_penalty=0.0, early_stopping="never")
    (best,) = answer(params, prompt, TINY, max_num_seqs=128)
    allowed = [pair for pair in every_answer(TINY, prompt, 4) if all(contains(pair[0], phrase) for phrase in wanted)]
    expected, score = max(allowed, key=lambda pair: pair[1])
    assert best.score == pytest.approx(score, abs=1e-5)
    assert tuple(best.token_ids) == expected


def test_without_phrases_the_banks_choose_what_plain_search_chooses(monkeypatch):
    params = BeamParams(width=4, n=4, max_tokens=10, stop_token_ids=[3, 5, 7, 8])
    plain = answer(params)
    used = []

    def none(*_):
        used.append(Banks(()))
        return used[-1]

    monkeypatch.setattr(sampler_module.Banks, "of", none)
    banked = answer(attrs.evolve(params, must_include=[[7]]))
    assert used
    assert [(c.token_ids, c.score) for c in banked] == [(c.token_ids, c.score) for c in plain]


def test_a_phrase_is_included_where_it_costs_least():
    """The search does not merely append it at the end."""
    wanted = (7, 8)
    params = BeamParams(width=8, n=8, max_tokens=16, must_include=[wanted], ignore_eos=True)
    places = {c.token_ids.index(7) for c in answer(params)}
    assert min(places) < 14
    last = answer(BeamParams(width=1, max_tokens=16, must_include=[wanted], ignore_eos=True))
    assert contains(last[0].token_ids, wanted)


@pytest.mark.parametrize(
    ("banks", "number", "width", "chosen"),
    [
        ({0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}, 2, 4, {0, 1, 4, 5}),
        ({0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}, 2, 5, {0, 1, 2, 4, 5}),
        ({0: [0], 2: [1, 2, 3, 4, 5]}, 3, 5, {0, 1, 2, 3, 4}),
        ({1: [0, 1, 2], 2: [3, 4, 5]}, 3, 4, {0, 1, 2, 3}),
        ({1: [5]}, 2, 4, {5}),
    ],
)
def test_places_are_dealt_evenly_and_what_is_left_to_those_that_miss_least(banks, number, width, chosen):
    assert _deal(banks, number, width) == chosen


def test_overlaps_count_and_interrupted_phrases_begin_anew():
    banks = Banks(((1, 1, 2), (2, 3)))
    tags = [0]
    tokens = []
    for token in (1, 1, 1, 2, 3):
        row = banks._row(_Row(tags[-1], tokens))
        tags.append(banks.after(row, token)[0])
        tokens.append(token)
    assert tags == [0, 0, 0, 0, 1, 3]
    assert [banks.after(banks._row(_Row(0, ids)), 1)[1] for ids in ([], [1], [1, 1], [5])] == [4, 3, 3, 4]


class _Row:
    def __init__(self, tag, tokens):
        self.tag = tag
        self.data = self
        self.output_token_ids = tokens


def test_a_phrase_inside_another_is_there_with_it():
    params = BeamParams(width=2, n=2, max_tokens=6, must_include=[(5, 6, 7), (6, 7), (5,)])
    assert Banks.of(_Asked(params.must_include), None, ()).phrases == ((5, 6, 7),)
    assert all(contains(c.token_ids, (5, 6, 7)) for c in answer(params))


def test_texts_are_encoded_exactly_as_they_stand():
    llm = make_llm()
    (output,) = llm.generate(["ab"], BeamParams(width=4, n=4, max_tokens=12, must_include=["HELLO", " X"]))
    assert all("HELLO" in c.text and " X" in c.text for c in output.outputs)


def test_what_cannot_be_included_is_refused_and_leaves_nothing_behind():
    engine, _ = make_engine()
    for wanted, message in (([[FAKE_VOCAB - 1]], "ends the answer"), (["a long text"], "must fit max_tokens")):
        with pytest.raises(ParamsError, match=f"must_include: .*{message}"):
            engine.add_request("r", PROMPT, BeamParams(must_include=wanted, max_tokens=4))
        assert_clean(engine)
    with pytest.raises(ParamsError, match=r"must_include: 64: outside the vocabulary"):
        engine.add_request("r", PROMPT, BeamParams(must_include=[[1, FAKE_VOCAB]]))
    with pytest.raises(ParamsError, match=r"must_include: .*need a tokenizer"):
        Banks.of(_Asked(("text",)), None, ())


class _Asked:
    def __init__(self, phrases):
        self.params = BeamParams(must_include=phrases)


def test_a_stop_string_may_end_every_answer_before_its_phrase():
    everything = [chr(32 + i) for i in range(FAKE_VOCAB - 1)]
    (best, *_) = answer(BeamParams(width=2, max_tokens=8, must_include=[[1, 2]], stop=everything))
    assert best.finish_reason == "stop"


def test_a_masked_phrase_still_gives_an_answer():
    found = answer(BeamParams(width=3, n=3, max_tokens=6, must_include=[[1, 2]], logit_bias=None, bad_words=['!"']))
    assert found
