from __future__ import annotations

import math

import pytest
import torch
from folo_core.errors import ParamsError
from folo_core.testing.builders import make_metadata
from folo_core.testing.conformance import PluginConformance, SamplerConformance
from hypothesis import given
from hypothesis import strategies as st

from folo_third_party_sampler.params import TypicalParams
from folo_third_party_sampler.sampler import TypicalSampler, typical_mask


class TestPlugin(PluginConformance):
    plugin = "typical"


class TestConformance(SamplerConformance):
    plugin = "typical"
    name = "typical"

    def params(self, part):
        return [
            TypicalParams(),
            TypicalParams(typical_p=0.3, seed=1),
            TypicalParams(temperature=0.0),
            TypicalParams(temperature=2.0, typical_p=1.0),
        ]


def reference(probs: list[float], mass: float) -> set[int]:
    """The definition, token by token, in plain Python."""
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    ranked = sorted((abs(-math.log(p) - entropy), token) for token, p in enumerate(probs) if p > 0)
    kept, total, edge = set(), 0.0, None
    for distance, token in ranked:
        if total >= mass and distance != edge:
            break
        if total < mass:
            edge = distance
        kept.add(token)
        total += probs[token]
    return kept


@given(
    weights=st.lists(st.integers(0, 40), min_size=2, max_size=12).filter(any),
    mass=st.sampled_from([0.05, 0.5, 0.93]),
)
def test_mask_is_the_definition(weights, mass):
    probs = torch.tensor([weights], dtype=torch.float64)
    probs /= probs.sum()
    kept = typical_mask(probs, torch.tensor([mass], dtype=torch.float64))[0]
    expected = reference(probs[0].tolist(), mass)
    # Equal weights may differ in the last bit of their distance; compare as sets of weights.
    assert {weights[t] for t in kept.nonzero().flatten().tolist()} == {weights[t] for t in expected}


def test_the_most_likely_token_can_be_atypical():
    probs = torch.tensor([[0.4, *[0.06] * 10]], dtype=torch.float64)
    kept = typical_mask(probs, torch.tensor([0.5], dtype=torch.float64))[0]
    assert not kept[0]
    assert kept[1:].all()


def test_draws_follow_the_kept_probabilities():
    rows = 20_000
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    metadata = make_metadata([TypicalParams(typical_p=1.0, seed=n) for n in range(rows)], vocab_size=4)
    tokens = TypicalSampler(4, torch.device("cpu")).step(probs.log().repeat(rows, 1), metadata).tokens
    counts = tokens.flatten().bincount(minlength=4)
    chi_square = ((counts - probs * rows) ** 2 / (probs * rows)).sum()
    assert chi_square < 16.3  # 99.9 % of chi-square with 3 degrees of freedom; seeds are fixed


def test_bad_mass_is_refused():
    with pytest.raises(ParamsError, match="typical_p: 0"):
        TypicalParams(typical_p=0)
