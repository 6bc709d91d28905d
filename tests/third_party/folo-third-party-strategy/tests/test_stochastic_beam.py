from __future__ import annotations

import itertools

import pytest
import torch
from folo_core.errors import ParamsError
from folo_core.testing.builders import logits_of, make_metadata, make_request
from folo_core.testing.conformance import PluginConformance, SamplerConformance
from folo_core.testing.harness import SamplerHarness

from folo_third_party_strategy import StochasticBeamParams
from folo_third_party_strategy.sampler import StochasticBeamSampler

VOCAB = 4


class TestPlugin(PluginConformance):
    plugin = "stochastic-beam"


class TestConformance(SamplerConformance):
    plugin = "stochastic-beam"
    name = "stochastic-beam"


def draw(steps, **params):
    """The texts drawn in order, with their scores."""
    request = make_request("r", StochasticBeamParams(**params), prompt=[1])
    texts = SamplerHarness(StochasticBeamSampler(), VOCAB).run([request], steps)["r"]
    return texts, sorted((sequence.score for sequence in request.finished), reverse=True)


def test_all_texts_are_drawn_and_none_twice():
    texts, scores = draw(3, k=VOCAB**3, n=VOCAB**3, seed=5)
    assert sorted(map(tuple, texts)) == sorted(itertools.product(range(VOCAB), repeat=3))
    assert scores[0] == 0.0  # the maximum is that of the root, on which all are conditioned


def test_a_wide_draw_begins_like_a_narrow_one():
    wide = draw(3, k=VOCAB**3, n=5, seed=9)[0]
    assert draw(3, k=5, n=5, seed=9)[0][0] == wide[0]


def test_pairs_are_drawn_without_replacement():
    """Of the pairs (first, second) each comes up as often as p_a * p_b / (1 - p_a) says, tokens drawn in one step."""
    draws = 20_000
    probs = torch.tensor([0.45, 0.3, 0.2, 0.05], dtype=torch.float64)
    metadata = make_metadata([StochasticBeamParams(k=2, seed=n) for n in range(draws)], vocab_size=VOCAB)
    sampler = StochasticBeamSampler()
    for name in metadata.request_ids:
        sampler.add_request(make_request(name, StochasticBeamParams()))
    output = sampler.step(probs.log().float().repeat(draws, 1), metadata)
    pairs = output.tokens.view(draws, 2)
    counts = (pairs[:, 0] * VOCAB + pairs[:, 1]).bincount(minlength=VOCAB**2).double().view(VOCAB, VOCAB)
    expected = draws * probs[:, None] * probs[None, :] / (1 - probs[:, None])
    off = ~torch.eye(VOCAB, dtype=torch.bool)
    assert counts.diagonal().sum() == 0
    assert ((counts - expected)[off] ** 2 / expected[off]).sum() < 31.3  # 99.9 % of chi-square with 11 degrees


def test_the_tag_is_the_texts_log_probability():
    request = make_request("r", StochasticBeamParams(k=3, seed=2), prompt=[1])
    harness = SamplerHarness(StochasticBeamSampler(), VOCAB)
    harness.add(request)
    for _ in range(3):
        harness.step()
    for sequence in request.live:
        text = sequence.data.output_token_ids
        plain = sum(logits_of([1, *text[:at]], VOCAB).double().log_softmax(-1)[token] for at, token in enumerate(text))
        assert torch.tensor(sequence.tag).view(torch.float64) == pytest.approx(float(plain))


def test_more_answers_than_texts_are_refused():
    with pytest.raises(ParamsError, match="n: 5: must be <= k"):
        StochasticBeamParams(k=4, n=5)
