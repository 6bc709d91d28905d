"""Prompt lookup: the incremental index finds what a search through the whole text finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata
from folo_speculative import SpeculativeParams
from folo_speculative.ngram import NgramIndex, NgramProposer


def search(text, shortest, longest, count):
    """The definition: the longest suffix that occurred before, at its latest occurrence, continued round the loop."""
    for n in range(longest, shortest - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[len(text) - n :]:
                continued = list(text)
                for offset in range(count):
                    continued.append(continued[place + offset])
                return continued[len(text) :]
    return []


texts = st.lists(st.integers(0, 3), max_size=40)


@given(text=texts, pieces=st.lists(st.integers(1, 7), max_size=8), shortest=st.integers(1, 3), more=st.integers(0, 2))
def test_any_growth_finds_what_a_search_finds(text, pieces, shortest, more):
    index = NgramIndex(shortest, shortest + more)
    length = 0
    for piece in [*pieces, len(text)]:
        length = min(length + piece, len(text))
        assert index.continue_(text[:length], 5) == search(text[:length], shortest, shortest + more, 5)


def test_the_longest_suffix_wins_and_of_equals_the_latest():
    index = NgramIndex(1, 3)
    assert index.continue_([1, 2, 3, 9, 8, 3, 7, 1, 2, 3], 2) == [9, 8]
    assert NgramIndex(1, 1).continue_([1, 2, 3, 9, 8, 3, 7, 1, 2, 3], 2) == [7, 1]


def test_a_loop_goes_round_past_the_end_of_the_text():
    assert NgramIndex(2, 4).continue_([5, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_a_text_that_never_repeats_drafts_nothing():
    assert NgramIndex(1, 4).continue_(list(range(50)), 4) == []
    assert NgramIndex(1, 4).continue_([], 4) == []


def propose(proposer, histories, params, **fields):
    metadata = make_metadata(params, vocab_size=64, histories=histories, **fields)
    return proposer.propose(metadata, 3)


def test_rows_are_padded_and_each_has_its_own_lengths():
    proposer = NgramProposer()
    text = [1, 2, 3, 4, 9, 4]
    draft = propose(
        proposer,
        [text, text, list(range(9))],
        [SpeculativeParams(min_ngram=1), SpeculativeParams(min_ngram=2), SpeculativeParams()],
    )
    assert draft.tokens.tolist() == [[9, 4, 9], [-1] * 3, [-1] * 3]
    assert draft.probs is None
    assert propose(NgramProposer(), [[1]], [SpeculativeParams()]).tokens.shape == (1, 0)


def test_it_serves_other_strategies_with_its_usual_lengths_and_keeps_sequences_apart():
    proposer = NgramProposer()
    histories = [[7, 1, 2, 7, 1], [7, 1, 3, 7, 1]]
    draft = propose(proposer, histories, [SamplingParams()] * 2, request_ids=["a", "a"])
    assert draft.tokens.tolist() == [[2, 7, 1], [3, 7, 1]]
    assert proposer._indexes.keys() == {"a"}
    proposer.remove_request("a")
    proposer.remove_request("never seen")
    assert not proposer._indexes
