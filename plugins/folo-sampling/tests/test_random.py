"""The random sampler: the distribution it draws from, and that a row's token depends on its own row alone."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_core.sampling.interface import Distribution
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata, make_request
from folo_sampling import masks, tensors
from folo_sampling.random import RandomSampler
from folo_sampling.tensors import TensorDraws, draw

CPU = torch.device("cpu")


def exact_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities of one row, float64: temperature, then top-k, top-p and min-p, each renormalised."""
    exact = logits.double()
    probabilities = ((exact - exact.max()) / params.temperature).softmax(0)
    if params.top_k:
        probabilities = probabilities * (exact >= exact.sort(descending=True).values[params.top_k - 1])
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1:
        order = exact.argsort(descending=True)
        last = order[int((probabilities[order].cumsum(0) < params.top_p).sum())]
        probabilities = probabilities * (exact >= exact[last])
    probabilities = probabilities * (probabilities >= params.min_p * probabilities.max())
    return probabilities / probabilities.sum()


def draws(logits: torch.Tensor, params: SamplingParams, count: int, *, seed: int = 0) -> torch.Tensor:
    """Tokens drawn at ``count`` positions from one row of logits."""
    zeros = [0] * count
    metadata = make_metadata([params] * count, vocab_size=len(logits), seeds=[seed] * count, sequence_indices=zeros)
    metadata.positions = torch.arange(count)
    return RandomSampler(len(logits), CPU).step(logits.expand(count, -1), metadata).tokens[:, 0]


def chance(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square p-value of the tokens' frequencies, in at most 60 bins of similar probability."""
    order = probabilities.argsort(descending=True)
    ordered = probabilities[order]
    bins = ((ordered.cumsum(0) - ordered / 2) * 60).long().clamp(max=59)
    expected = torch.zeros(60).double().index_add_(0, bins, ordered * len(tokens))
    counts = torch.bincount(tokens, minlength=len(order))[order].double()
    observed = torch.zeros(60).double().index_add_(0, bins, counts)
    expected, observed = expected[expected > 0], observed[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor(max(len(expected) - 1, 1)).double()
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


COMBINATIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1e5},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 7},
    {"top_k": 30, "temperature": 0.7},
    {"top_k": 1500, "temperature": 3.0},
    {"top_p": 0.95},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"top_p": 0.9, "temperature": 1.7},
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 1.5},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 12, "top_p": 0.8, "temperature": 0.5},
    {"top_k": 20, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 15, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3},
    {"top_k": 1200, "top_p": 0.99, "temperature": 2.0},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.001, "temperature": 0.1},
]


class TestDistribution:
    @pytest.mark.parametrize("vocab_size", [50, 4500])
    @pytest.mark.parametrize("fields", COMBINATIONS, ids=repr)
    def test_frequencies_match(self, fields, vocab_size):
        generator = torch.Generator().manual_seed(vocab_size)
        # Rounded, so that tokens tie; the largest is a tie of two.
        logits = (torch.randn(vocab_size, generator=generator) * 6).round() / 3
        logits[vocab_size // 2] = logits.max()
        logits[vocab_size // 3] = -math.inf
        fields = {**fields, "top_k": min(fields.get("top_k", 0), vocab_size - 1)}
        params = SamplingParams(**fields)
        probabilities = exact_distribution(logits, params)
        tokens = draws(logits, params, 30_000 if vocab_size == 50 else 6_000)
        assert (probabilities[tokens] > 0).all(), "a filtered token was drawn"
        assert chance(tokens, probabilities) > 1e-3
        if len(probabilities.nonzero()) > 20 and params.temperature < 10:
            wrong = exact_distribution(logits, attrs.evolve(params, temperature=params.temperature * 1.2))
            assert chance(tokens, wrong) < 1e-3, "the test could not tell a temperature that is off by a fifth"

    def test_positions_seeds_and_sequences_draw_anew(self):
        logits = torch.zeros(1000)
        first, second = draws(logits, SamplingParams(), 500), draws(logits, SamplingParams(), 500, seed=1)
        assert len(set(first.tolist())) > 350
        assert (first == second).sum() < 20


def params_of(row: int) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8 + row % 3, **COMBINATIONS[row % len(COMBINATIONS)]}, seed=row)


def batch(rows: list[int], vocab_size: int = 5000, *, step: float = 0.5) -> tuple[torch.Tensor, list[SamplingParams]]:
    logits = torch.stack([torch.randn(vocab_size, generator=torch.Generator().manual_seed(row)) * 3 for row in rows])
    return torch.round(logits / step) * step, [params_of(row) for row in rows]


def step(rows: list[int], position: int = 9, sampler: RandomSampler | None = None, **batch_options) -> list[int]:
    logits, params = batch(rows, **batch_options)
    metadata = make_metadata(params, vocab_size=logits.shape[1], histories=[[0] * position for _ in rows])
    output = (sampler or RandomSampler(logits.shape[1], CPU)).step(logits, metadata)
    assert output.parents.tolist() == list(range(len(rows)))
    assert output.tokens.shape == (len(rows), 1)
    return output.tokens[:, 0].tolist()


class TestRowsAreIndependent:
    ROWS = range(48)

    def test_alone_batched_and_reordered(self):
        together = step(self.ROWS)
        assert len(set(together)) > 20
        assert [step([row])[0] for row in self.ROWS] == together
        assert step(self.ROWS[::-1]) == together[::-1]
        interleaved = [*self.ROWS[::2], *self.ROWS[1::2]]
        assert step(interleaved) == [together[row] for row in interleaved]

    @given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=12, unique=True), st.integers(0, 10_000))
    @settings(max_examples=25, deadline=None)
    def test_any_neighbours(self, rows, position):
        together = step(rows, position, vocab_size=700)
        assert [step([row], position, vocab_size=700)[0] for row in rows] == together

    @pytest.mark.parametrize("chunk", [1, 5000, 15_000])
    def test_chunks(self, chunk, monkeypatch):
        expected = step(self.ROWS)
        monkeypatch.setattr(tensors, "_HOST_CHUNK", chunk)
        assert step(self.ROWS) == expected

    def test_a_neighbour_gone_wrong(self):
        """The engine takes such rows out first; even so they change no other."""
        expected = step(self.ROWS)
        logits, params = batch(self.ROWS)
        logits[0], logits[5], logits[20] = math.nan, -math.inf, math.inf
        metadata = make_metadata(params, vocab_size=5000, histories=[[0] * 9 for _ in self.ROWS])
        tokens = RandomSampler(5000, CPU).step(logits, metadata).tokens[:, 0].tolist()
        assert [t for row, t in enumerate(tokens) if row not in {0, 5, 20}] == [
            t for row, t in enumerate(expected) if row not in {0, 5, 20}
        ]
        assert all(0 <= token < 5000 for token in tokens)

    def test_logits_are_left_as_they_were(self):
        logits, params = batch(self.ROWS)
        before = logits.clone()
        RandomSampler(5000, CPU).step(logits, make_metadata(params, vocab_size=5000))
        assert torch.equal(logits, before)


class TestEveryWayLeadsToTheSameToken:
    @pytest.mark.parametrize("rounding", [0.5, 0.001])
    @pytest.mark.parametrize("position", range(6))
    def test_short_lists_whole_rows_buckets_and_sorts(self, position, rounding, monkeypatch):
        rows = list(range(48))
        short_calls = []
        original = TensorDraws._draw_short
        monkeypatch.setattr(
            TensorDraws, "_draw_short", lambda *args: short_calls.append(original(*args)) or short_calls[-1]
        )
        expected = step(rows, position, step=rounding)
        assert len(short_calls) == 1
        assert bool(short_calls[0]) == (rounding == 0.5), "ties must have been cut off exactly where there are many"
        whole = RandomSampler(5000, CPU)
        whole._draws._short_top_k = 0
        assert step(rows, position, whole, step=rounding) == expected
        assert len(short_calls) == 1
        monkeypatch.setattr(masks, "_BUCKETS", 10**6)  # rows are narrower, so they are sorted, as on a device
        assert step(rows, position, whole, step=rounding) == expected

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_device(self):
        rows = list(range(48))
        logits, params = batch(rows)
        metadata = make_metadata(params, vocab_size=5000, histories=[[0] * 9 for _ in rows], device="cuda")
        sampler = RandomSampler(5000, torch.device("cuda"))
        together = sampler.step(logits.cuda(), metadata).tokens[:, 0].tolist()
        alone = []
        for row in rows:
            metadata = make_metadata([params[row]], vocab_size=5000, histories=[[0] * 9], device="cuda")
            alone += sampler.step(logits[row : row + 1].cuda(), metadata).tokens[:, 0].tolist()
        assert alone == together
        # exp() may differ between devices in its last bit, which moves hardly any draw to another token.
        assert sum(a != b for a, b in zip(together, step(rows), strict=True)) <= 1


class TestExtremes:
    @pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-3, 1.0, 1e5, 3e38])
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
    def test_only_possible_tokens(self, temperature, scale):
        logits = torch.tensor([-1.0, 1.0, -math.inf, 1.0, 0.5, -math.inf]) * scale
        for fields in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 1e-6}, {"top_k": 4, "top_p": 0.9, "min_p": 0.01}):
            tokens = set(draws(logits, SamplingParams(temperature=temperature, **fields), 300).tolist())
            flat = temperature > 0 and scale / temperature < 1e-3
            certain = temperature == 0 or scale / temperature >= 1e3
            assert tokens <= {0, 1, 3, 4}
            if certain:
                assert tokens == {1, 3}
            if flat and not fields:
                assert tokens == {0, 1, 3, 4}

    @pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
    def test_one_token_left(self, fields):
        logits = torch.full((300,), -math.inf)
        logits[123] = -1e4
        assert set(draws(logits, SamplingParams(**fields), 50).tolist()) == {123}

    def test_a_vocabulary_of_one(self):
        assert draws(torch.tensor([3.0]), SamplingParams(top_k=5, top_p=0.5), 3).tolist() == [0, 0, 0]


class TestDraw:
    @pytest.mark.parametrize("length", [1, 7, 2048, 2049, 5000])
    def test_ends_of_the_unit_interval(self, length):
        """Weight 0 before, between and after is never drawn, from the first share to the last."""
        weights = torch.zeros(2, length, dtype=torch.float64)
        first, last = length // 3, length - 1 - length // 4
        weights[:, first] = weights[:, last] = 1.0
        uniforms = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
        assert draw(weights, uniforms, length).tolist() == [first, last]

    @pytest.mark.parametrize("length", [100, 3000])
    def test_inverts_the_distribution(self, length):
        """Evenly spaced shares draw each token in proportion to its weight, in the order of token ids."""
        weights = torch.rand(length, generator=torch.Generator().manual_seed(1)).double()
        weights[0] = 1.0
        count = 20_000
        shares = (torch.arange(count).double() + 0.5) / count
        tokens = draw(weights.expand(count, -1).clone(), shares[:, None], length)
        assert (tokens.diff() >= 0).all()
        expected = weights / weights.sum() * count
        assert ((torch.bincount(tokens, minlength=length) - expected).abs() < 1.01).all()

    def test_sums_do_not_depend_on_their_order(self):
        """Shares that meet running sums exactly draw the same entry from a short list and from blocks of a wide row."""
        length, places = 5000, torch.arange(7, 5000, 33)
        # Tenths: sums of them are whole on paper and just above or below it in binary, depending on the order.
        listed = torch.randint(1, 10, (len(places),), generator=torch.Generator().manual_seed(2)).double() / 10
        listed[3] = 1.0
        row = torch.zeros(length).double().index_put_((places,), listed)
        shares = (listed.cumsum(0) / listed.sum())[:-1, None]
        steps = torch.cat((shares, torch.nextafter(shares, torch.zeros_like(shares))))
        from_list = draw(listed.expand(len(steps), -1).clone(), steps, length)
        assert torch.equal(draw(row.expand(len(steps), -1).clone(), steps, length), places[from_list])
        assert len(from_list.unique()) > len(places) * 0.9


def test_finish_ranks_what_is_finished():
    request = make_request("r", SamplingParams())
    sampler = RandomSampler(10, CPU)
    sampler.add_request(request)
    assert sampler.finish(request) == []
    sampler.remove_request("r")


class TestProbabilities:
    @pytest.mark.parametrize("vocab_size", [50, 4500])
    def test_are_the_exact_distributions_and_add_up_to_one(self, vocab_size):
        logits = torch.stack(
            [
                torch.randn(vocab_size, generator=torch.Generator().manual_seed(row)) * 3
                for row in range(len(COMBINATIONS))
            ]
        )
        params = [
            SamplingParams(**{**fields, "top_k": min(fields.get("top_k", 0), vocab_size - 1)})
            for fields in COMBINATIONS
        ]
        sampler = RandomSampler(vocab_size, CPU)
        assert isinstance(sampler, Distribution)
        found = sampler.probabilities(logits, make_metadata(params, vocab_size=vocab_size))
        assert found.dtype == torch.float32
        assert found.shape == logits.shape
        for row, one in enumerate(params):
            exact = exact_distribution(logits[row], one)
            assert torch.allclose(found[row].double(), exact, rtol=1e-4, atol=1e-8)
            assert not found[row][exact == 0].any(), "a filtered token has no probability at all"
            alone = sampler.probabilities(logits[row : row + 1].clone(), make_metadata([one], vocab_size=vocab_size))
            assert torch.equal(alone[0], found[row]), "a row does not depend on its neighbours"

    def test_a_draw_never_leaves_them(self):
        logits, params = batch(list(range(40)))
        metadata = make_metadata(params, vocab_size=5000, histories=[[0] * 9] * 40)
        sampler = RandomSampler(5000, CPU)
        found = sampler.probabilities(logits, metadata)
        tokens = sampler.step(logits, metadata).tokens
        assert (found.gather(1, tokens) > 0).all()
        assert (found > 0).sum(1).min() < 100 < (found > 0).sum(1).max(), "some rows were filtered, some were not"
