"""Top-k, top-p and min-p against a float64 reference that sorts and sums everything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata
from folo_sampling import masks

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
temperatures = st.sampled_from([1e-5, 0.1, 0.7, 1.0, 1.3, 10.0, 1e5])
some_params = st.builds(
    SamplingParams,
    temperature=temperatures,
    top_k=st.sampled_from([0, 1, 2, 3, 7, 50, 10_000]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
)


def reference_mask(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Kept tokens of one row, step by step as the definitions say, in float64."""
    exact = logits.double()
    keep = torch.ones_like(exact, dtype=torch.bool)
    if 0 < params.top_k < len(exact):
        keep = exact >= exact.sort(descending=True).values[params.top_k - 1]
    weights = ((exact - exact.max()) / torch.tensor(params.temperature).double()).exp()
    top_p = torch.tensor(params.top_p).double()
    if top_p < 1:
        probabilities = torch.where(keep, weights, 0.0)
        probabilities = probabilities / probabilities.sum()
        order = exact.argsort(descending=True, stable=True)
        reached = probabilities[order].cumsum(0) >= top_p
        last = order[reached.double().argmax()] if reached.any() else order[-1]
        keep = keep & (exact >= exact[last])
    return keep & (weights >= torch.tensor(params.min_p).double() * weights.max())


def masks_of(
    logits: torch.Tensor, params: list[SamplingParams], device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens by the cut and, as drawing sees them, by the weights, both ``[rows, vocab]``."""
    logits = logits.to(device)
    filters = masks.Filters.of(make_metadata(params, vocab_size=logits.shape[1], device=device), logits.shape[1])
    weights = masks.weigh(logits, filters.temperature)
    cut = masks.narrow_(logits, weights, masks.top_k_cut(logits, filters.top_k), filters, nucleus=True)
    return (logits >= cut).cpu(), (weights > 0).cpu()


def check(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Compare with the reference row by row; return the mask."""
    expected = torch.stack([reference_mask(row, p) for row, p in zip(logits, params, strict=True)])
    # The reference keeps tokens of probability 0, -inf among them, where no filter is on. Drawing ignores both.
    temperature = torch.tensor([p.temperature for p in params]).double()[:, None]
    depth = (logits.double() - logits.double().amax(1, keepdim=True)) / temperature
    for device in DEVICES:
        kept, weighted = masks_of(logits, params, device)
        assert torch.equal(kept, expected)
        assert torch.equal(weighted, expected & (depth.exp() > 0))
        assert weighted.any(1).all()
    return expected


def tied_logits(rows: int, vocab_size: int, *, seed: int, spread: float = 3.0, step: float = 0.0) -> torch.Tensor:
    """Normal logits; with ``step`` they are rounded to multiples of it, as low precision does, so many tie."""
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return torch.round(logits / step) * step if step else logits


def odd_row(vocab_size: int, seed: int, levels: int, masked: float) -> torch.Tensor:
    """A row of a few distinct values (``levels`` > 0) or of any up to 1e4, a part of it -inf, one token never."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        row = torch.randint(0, levels, (vocab_size,), generator=generator) * 0.75
    else:
        row = torch.randn(vocab_size, generator=generator) * 10.0 ** torch.randint(
            -3, 4, (vocab_size,), generator=generator
        )
    hidden = torch.rand(vocab_size, generator=generator) < masked
    hidden[seed % vocab_size] = False
    return row.masked_fill(hidden, -math.inf)


@st.composite
def batches(draw):
    vocab_size = draw(st.integers(min_value=1, max_value=80))
    row = st.builds(
        odd_row,
        st.just(vocab_size),
        st.integers(min_value=0, max_value=2**32),
        st.sampled_from([0, 1, 2, 5, 20]),
        st.sampled_from([0.0, 0.3, 1.0]),
    )
    rows = draw(st.lists(st.tuples(row, some_params), min_size=1, max_size=4))
    return torch.stack([values for values, _ in rows]), [params for _, params in rows]


class TestMasksEqualTheReference:
    @given(batches())
    def test_small_rows_with_ties(self, batch):
        check(*batch)

    @given(batches())
    def test_in_buckets(self, batch):
        """The radix select of wide rows, forced on narrow ones so that most buckets hold several tokens."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masks, "_BUCKETS", 5)
            check(*batch)

    @pytest.mark.parametrize("step", [0.0, 0.25, 2.0])
    @pytest.mark.parametrize("vocab_size", [4095, 20_011, 49_152])
    def test_wide_rows(self, vocab_size, step):
        params = [
            SamplingParams(top_p=0.9),
            SamplingParams(top_p=0.999, temperature=3.0),
            SamplingParams(top_p=0.5, temperature=1e5),
            SamplingParams(top_k=48),
            SamplingParams(top_k=900, top_p=0.7),
            SamplingParams(top_k=1500, top_p=0.95, temperature=2.0),
            SamplingParams(top_k=20, top_p=0.9, min_p=0.02),
            SamplingParams(min_p=0.01),
        ]
        kept = check(tied_logits(len(params), vocab_size, seed=vocab_size, step=step), params).sum(1)
        assert (kept < vocab_size).all()
        if step == 2.0:
            assert kept[3] > 48, "no tie at the 48th token: this has tested less than it says"

    def test_wide_rows_of_one_value(self):
        check(
            torch.full((3, 5000), -7.25), [SamplingParams(top_p=0.2), SamplingParams(top_k=3), SamplingParams(min_p=1)]
        )

    def test_wide_rows_with_few_tokens_left(self):
        logits = torch.full((3, 5000), -math.inf)
        logits[:, 4321] = -1e4
        logits[1:, 17] = 1e4
        logits[2, 5] = 1e4
        kept = masks_of(logits, [SamplingParams(top_p=0.9, top_k=4, min_p=0.1)] * 3)[1]
        assert [row.nonzero().flatten().tolist() for row in kept] == [[4321], [17], [5, 17]]

    def test_boundaries_keep_ties(self):
        logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]])
        assert check(logits, [SamplingParams(top_k=2)]).tolist() == [[True] * 4 + [False] * 2]
        # The most likely token has probability 0.6, so 0.7 is reached by one of the three, and all of them stay.
        assert check(logits, [SamplingParams(top_p=0.7)]).tolist() == [[True] * 4 + [False] * 2]
        assert check(logits, [SamplingParams(min_p=0.3)]).tolist() == [[True] * 4 + [False] * 2]

    def test_exact_halves(self):
        """Two equal tokens hold the mass 0.5 each: 0.5 is reached by one, and the other is tied with it."""
        logits = torch.tensor([[0.0, 0.0, -800.0]])
        assert check(logits, [SamplingParams(top_p=0.5)]).tolist() == [[True, True, False]]

    def test_top_p_counts_what_top_k_left(self):
        """Of 0.5, 0.25, 0.25 top-k 2 with its tie leaves all; of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 0.57 and 0.43."""
        logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        assert check(logits, [SamplingParams(top_k=2, top_p=0.55)]).tolist() == [[True, False, False, False]]
        assert check(logits, [SamplingParams(top_p=0.55)]).tolist() == [[True, True, False, False]]


class TestCuts:
    @given(batches(), st.integers(min_value=1, max_value=80))
    def test_largest_equals_topk(self, batch, count):
        logits, _ = batch
        count = min(count, logits.shape[1])
        values, ids = masks.largest(logits, count)
        assert torch.equal(values, logits.topk(count, 1).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == count for row in ids.tolist())

    @pytest.mark.parametrize("vocab_size", [640, 1000, 49_152])
    def test_largest_uses_blocks_and_the_tail(self, vocab_size):
        logits = tied_logits(6, vocab_size, seed=3, step=0.5)
        logits[0, -1] = 100.0  # in the tail, where the width is no multiple of a block
        values, ids = masks.largest(logits, 5)
        assert torch.equal(values, logits.topk(5, 1).values)
        assert ids[0, 0] == vocab_size - 1
        assert torch.equal(logits.gather(1, ids), values)

    @given(
        st.floats(min_value=-1e4, max_value=1e4, width=32),
        st.floats(min_value=2**-16, max_value=2**17, width=32),
        st.floats(min_value=2**-20, max_value=1, width=32),
    )
    def test_min_p_cut_is_the_least_float_that_passes(self, maximum, temperature, min_p):
        params = [SamplingParams(temperature=temperature, min_p=min_p)]
        filters = masks.Filters.of(make_metadata(params, vocab_size=9), 9)
        cut = masks.min_p_cut(torch.tensor([[maximum]]), filters)
        exact = maximum + filters.temperature * filters.min_p.log()
        below = torch.nextafter(cut, torch.tensor(-math.inf))
        assert below.double() < exact <= cut.double()
        assert cut <= maximum

    def test_long_top_k_in_mixed_rows(self):
        logits = tied_logits(4, 6000, seed=5, step=0.125)
        cut = masks.top_k_cut(logits, [3000, 0, 1, 3000])
        ordered = logits.sort(dim=1, descending=True).values
        assert cut.flatten().tolist() == [ordered[0, 2999], -math.inf, ordered[2, 0], ordered[3, 2999]]
