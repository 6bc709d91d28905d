"""Greedy decoding: the largest logit, and of equal ones the lowest id."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata
from folo_sampling.greedy import GreedySampler, lowest_argmax

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def plain_argmax(row: torch.Tensor) -> int:
    values = row.tolist()
    return values.index(max(values))


@given(
    vocab_size=st.integers(min_value=1, max_value=700),
    levels=st.integers(min_value=1, max_value=4),
    seed=st.integers(min_value=0, max_value=2**32),
)
def test_lowest_of_equals(vocab_size, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (3, vocab_size), generator=generator).float()
    logits[0].masked_fill_(torch.rand(vocab_size, generator=generator) < 0.5, -math.inf)
    for device in DEVICES:
        assert lowest_argmax(logits.to(device)).tolist() == [plain_argmax(row) for row in logits]


@pytest.mark.parametrize("vocab_size", [127, 128, 129, 50_257])
def test_every_place_can_win(vocab_size):
    places = sorted({0, 1, vocab_size // 2, vocab_size // 128 * 128 - 1, vocab_size - 2, vocab_size - 1})
    logits = torch.zeros(len(places), vocab_size)
    for row, place in enumerate(places):
        logits[row, place] = 1.0
    assert lowest_argmax(logits).tolist() == [place % vocab_size for place in places]


def test_a_slice_of_wider_rows():
    """The engine may hand over a view: its rows are further apart than they are long."""
    wide = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert lowest_argmax(wide[:, :900]).tolist() == wide[:, :900].argmax(1).tolist()


def test_step_is_the_identity():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    output = GreedySampler().step(logits, make_metadata([SamplingParams(temperature=0)] * 2, vocab_size=3))
    assert output.parents.tolist() == [0, 1]
    assert output.tokens.tolist() == [[1], [0]]
    assert output.finished is None


def test_half_precision_logits_are_read_as_they_are():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert lowest_argmax(logits).tolist() == [plain_argmax(row) for row in logits]
    assert GreedySampler.reads_any_dtype
    assert GreedySampler().steady_after(SamplingParams(temperature=0)) == 0
