"""Hypothesis strategies for the inputs of samplers and logits processors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata

from folo_core.testing.builders import make_metadata

seeds = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def logits(*, rows: int, vocab_size: int, masked: bool = True) -> st.SearchStrategy[torch.Tensor]:
    """Logits, float32 ``[rows, vocab_size]``, with ties and, if ``masked``, -inf; token 0 is never masked."""
    values = st.integers(min_value=-8, max_value=8).map(float)
    if masked:
        values = values | st.just(float("-inf"))
    matrix = st.lists(st.lists(values, min_size=vocab_size - 1, max_size=vocab_size - 1), min_size=rows, max_size=rows)
    first = st.lists(st.integers(min_value=-8, max_value=8).map(float), min_size=rows, max_size=rows)
    return st.builds(lambda ends, rest: torch.cat([torch.tensor([ends]).T, torch.tensor(rest)], 1), first, matrix)


def sampling_params(**fixed: object) -> st.SearchStrategy[SamplingParams]:
    """Plain parameters of one sequence: greedy or random, with and without truncation, always seeded."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": seeds,
    }
    chosen = {name: strategy for name, strategy in fields.items() if name not in fixed}
    return st.builds(SamplingParams, **chosen, **{name: st.just(value) for name, value in fixed.items()})


@st.composite
def metadata(draw: st.DrawFn, *, vocab_size: int, max_rows: int = 5) -> SamplingMetadata:
    """One step's metadata: requests of one row each, with histories of their own."""
    params = draw(st.lists(sampling_params(), min_size=1, max_size=max_rows))
    token = st.integers(min_value=0, max_value=vocab_size - 1)
    histories = [draw(st.lists(token, min_size=1, max_size=6)) for _ in params]
    return make_metadata(params, vocab_size=vocab_size, histories=histories)
