"""The kernels against the tensor operations of ``masks`` and ``random``: in Triton's interpreter, and compiled."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import triton  # noqa: E402

from folo_core.sampling.rng import uniform  # noqa: E402
from folo_core.sampling_params import SamplingParams  # noqa: E402
from folo_core.testing.builders import make_metadata  # noqa: E402
from folo_sampling import device, greedy, random, tensors  # noqa: E402
from folo_sampling.greedy import GreedySampler  # noqa: E402
from folo_sampling.masks import Filters, top_k_cut, top_p_cut, weigh  # noqa: E402
from folo_sampling.random import RandomSampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")

PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]
SMALL = device.Tuning(chunk=64, warps=4, tile=64, tile_warps=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=PLACES)
def place(request) -> torch.device:
    return torch.device(request.param)


def rows_of(count: int, vocab: int, place: torch.device, dtype: torch.dtype, *, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + vocab)
    return (torch.randn(count, vocab, generator=generator) * scale).to(dtype).to(place)


def parameters(fields: list[dict[str, float]], vocab: int, place: torch.device) -> dict[str, torch.Tensor]:
    """The eight tensors that ``draw_tokens`` takes, for rows with these parameters."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in fields], dtype=dtype, device=place)

    places = torch.arange(len(fields), device=place)
    return {
        "temperature": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", vocab, torch.int64),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "seeds": places * 7919 - 5 * 2**60,
        "sequence_indices": places % 3,
        "positions": places + 11,
    }


def filters_of(given: dict[str, torch.Tensor], vocab: int) -> Filters:
    top_k = [k if 0 < k < vocab else 0 for k in given["top_k"].tolist()]
    columns = (given[name].double()[:, None] for name in ("top_p", "min_p"))
    return Filters(given["temperature"].double()[:, None], top_k, *columns, some_min_p=True)


def expected_tokens(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What tensor operations draw; temperatures above 0 only."""
    weights = tensors._weights(logits.float(), filters_of(given, logits.shape[1]), nucleus=True)
    numbers = uniform(given["seeds"], given["sequence_indices"], given["positions"])
    return tensors.draw(weights, numbers[:, None], logits.shape[1])


MIX = [
    {},
    {"temperature": 0.3},
    {"temperature": 40.0, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_k": 90, "top_p": 0.8},
    {"top_p": 0.95},
    {"top_p": 0.3, "temperature": 0.02},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 1.4},
    {"top_p": 0.999999, "temperature": 1.5},
]


@triton.jit
def _write_uniforms(seeds, indices, positions, numbers):
    row = device.tl.program_id(0)
    number = device._uniform(
        device.tl.load(seeds + row), device.tl.load(indices + row), device.tl.load(positions + row)
    )
    device.tl.store(numbers + row, number)


def test_random_numbers_are_the_core_s_bit_for_bit(place):
    edges = torch.tensor([0, 1, -1, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 123456789])
    keys = torch.cartesian_prod(edges, edges[:4], edges[-3:]).to(place)
    seeds, indices, positions = (column.contiguous() for column in keys.T)
    numbers = torch.empty(len(keys), dtype=torch.float64, device=place)
    _write_uniforms[(len(keys),)](seeds, indices, positions, numbers)
    assert torch.equal(numbers, uniform(seeds, indices, positions))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_draws_what_tensor_operations_draw(place, dtype):
    vocab = 151_936 if place.type == "cuda" else 150
    fields = MIX * (20 if place.type == "cuda" else 1)
    logits = rows_of(len(fields), vocab, place, dtype)
    logits[:, 3] = -math.inf
    given = parameters(fields, vocab, place)
    tuning = device.TUNING if place.type == "cuda" else SMALL
    drawn = device.draw_tokens(logits, **given, tuning=tuning)
    # Compiled, exp() may differ from torch's in the last bit, which hardly ever moves a draw to another token.
    assert (drawn.tokens != expected_tokens(logits, given)).sum() <= (1 if place.type == "cuda" else 0)
    assert torch.equal(drawn.peaks, logits.float().amax(1))


def cut_of(key: int, shift: int) -> float:
    """The logit of a key."""
    bits = key << shift
    bits = bits & 0x7FFFFFFF if bits & 0x80000000 else ~bits & 0xFFFFFFFF & ~((1 << shift) - 1)
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [0.5, 4.0])
def test_cuts_are_exact_with_many_ties(place, dtype, levels):
    vocab = 50_257 if place.type == "cuda" else 130
    fields = [row for row in MIX if row.keys() & {"top_k", "top_p"}]
    logits = ((rows_of(len(fields), vocab, place, dtype) * levels).round() / levels).to(dtype)
    given = parameters(fields, vocab, place)
    tuning = device.TUNING if place.type == "cuda" else SMALL
    rows = device._Rows.of(logits, tuning)
    keys = device._cuts(rows, given["temperature"], given["top_k"], given["top_p"]).tolist()
    filters, exact = filters_of(given, vocab), logits.float()
    expected = top_k_cut(exact, filters.top_k)
    weights = weigh(exact, filters.temperature) * (exact >= expected)
    nucleus = torch.maximum(top_p_cut(exact, weights, filters), expected)
    expected = torch.where(filters.top_p < 1, nucleus, expected)[:, 0].tolist()
    # Where a token has no mass at all it cannot be drawn, so a cut below it may be any.
    for key, cut, row in zip(keys, expected, exact, strict=True):
        assert ((row >= cut) == (row >= cut_of(key, rows.shift))).all() or key == 0


def test_a_cut_s_key_is_read_back():
    for dtype in DTYPES:
        shift = device._Rows(torch.zeros(1, 1, dtype=dtype), SMALL, *[torch.zeros(1, 1)] * 3).shift
        for value in (1.5, -1.5, 0.0, -0.25, 24.0):
            bits = torch.tensor([value]).view(torch.int32).item() & 0xFFFFFFFF
            key = (bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)) >> shift
            assert cut_of(key, shift) == value


# The interpreter is too slow to shrink an example.
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_any_small_rows(data):
    place = torch.device("cuda" if CUDA else "cpu")
    vocab, levels = data.draw(st.integers(1, 100)), data.draw(st.sampled_from([1, 3, 40]))
    count = data.draw(st.integers(1, 3))
    shapes = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1e-30, 0.1, 1.0, 7.0, 3e38]),
            "top_k": st.integers(1, vocab + 1),
            "top_p": st.sampled_from([1.0, 0.999, 0.5, 1e-9]),
            "min_p": st.sampled_from([0.0, 0.2, 1.0]),
        }
    )
    given_rows = parameters([data.draw(shapes) for _ in range(count)], vocab, place)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(-levels, levels + 1, (count, vocab), generator=generator).to(torch.bfloat16).to(place) / 2
    logits[:, 1:].masked_fill_(torch.rand(count, vocab - 1, generator=generator).to(place) < 0.2, -math.inf)
    drawn = device.draw_tokens(logits, **given_rows, tuning=SMALL)
    assert drawn.tokens.tolist() == expected_tokens(logits, given_rows).tolist()
    assert torch.equal(drawn.peaks, logits.float().amax(1))


def test_neither_neighbours_nor_the_layout_matter(place):
    vocab = 30_011 if place.type == "cuda" else 150
    fields = [{**MIX[number % len(MIX)], "temperature": 0.7 + number % 3} for number in range(6)]
    logits, given = rows_of(6, vocab, place, torch.bfloat16), parameters(fields, vocab, place)
    together = device.draw_tokens(logits, **given, tuning=SMALL).tokens
    for tuning in (device.Tuning(chunk=32, warps=2, tile=128, tile_warps=2), device.Tuning(chunk=256, tile=32)):
        assert torch.equal(device.draw_tokens(logits, **given, tuning=tuning).tokens, together)
    for row in (0, 5):
        alone = {name: column[row : row + 1] for name, column in given.items()}
        assert device.draw_tokens(logits[row : row + 1], **alone, tuning=SMALL).tokens.item() == together[row]


def test_a_view_of_wider_rows_and_no_filters(place):
    wide = rows_of(3, 200, place, torch.float32)
    given = parameters([{}, {"min_p": 0.2}, {"temperature": 0.0}], 150, place)
    drawn = device.draw_tokens(wide[:, :150], **given, filtered=False, tuning=SMALL)
    expected = device.draw_tokens(wide[:, :150].contiguous(), **given, tuning=SMALL)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert drawn.tokens[2] == wide[2, :150].argmax()


def test_greedy_takes_the_lowest_of_equals_and_zeros_of_either_sign_are_equal(place):
    logits = torch.full((5, 150), -3.0, device=place)
    logits[0, [70, 9, 140]] = 2.0
    logits[1, 5], logits[1, 130] = -0.0, 0.0
    logits[2] = -math.inf
    logits[3, 149] = 7.0
    greedy_tokens = device.greedy_tokens(logits, tuning=SMALL)
    assert greedy_tokens.tokens.tolist() == [9, 5, 0, 149, 0]
    given = parameters([{"temperature": 0.0, "top_k": 3, "top_p": 0.5}] * 5, 150, place)
    drawn = device.draw_tokens(logits, **given, tuning=SMALL)
    assert torch.equal(drawn.tokens, greedy_tokens.tokens)
    assert drawn.peaks.tolist() == greedy_tokens.peaks.tolist() == [2.0, 0.0, -math.inf, 7.0, -3.0]


def test_rows_that_cannot_be_sampled_are_told_by_their_peak_and_disturb_no_other(place):
    logits, fields = rows_of(4, 150, place, torch.bfloat16), [{"top_k": 9, "top_p": 0.9}] * 4
    given = parameters(fields, 150, place)
    expected = device.draw_tokens(logits, **given, tuning=SMALL).tokens[0].item()
    logits[1, 77], logits[2, 100], logits[3] = math.nan, math.inf, -math.inf
    for drawn in (device.draw_tokens(logits, **given, tuning=SMALL), device.greedy_tokens(logits, tuning=SMALL)):
        assert drawn.peaks.isnan().tolist() == [False, True, False, False]
        assert drawn.peaks[2:].tolist() == [math.inf, -math.inf]
        assert ((drawn.tokens >= 0) & (drawn.tokens < 150)).all()
    assert device.draw_tokens(logits, **given, tuning=SMALL).tokens[0] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(place, dtype):
    vocab = 151_936 if place.type == "cuda" else 150
    logits = rows_of(4, vocab, place, dtype)
    logits[0, :40] = -math.inf
    tokens = torch.tensor([[5, 41, 149], [0, 1, 2], [149, 149, 0], [7, 8, 9]], device=place)
    found = device.log_probs_of(logits, tokens, tuning=device.TUNING if place.type == "cuda" else SMALL)
    expected = logits.double().log_softmax(1).gather(1, tokens)
    assert found[0, 0] == -math.inf
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=5e-6)


def test_what_cannot_be_read_is_refused(place):
    with pytest.raises(ValueError, match="float64"):
        device.greedy_tokens(torch.zeros(1, 8, dtype=torch.float64, device=place))
    with pytest.raises(ValueError, match="contiguous"):
        device.greedy_tokens(torch.zeros(8, 3, device=place).T)


def test_the_samplers_use_the_kernels(place, monkeypatch):
    for module in (greedy, random):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    params = [SamplingParams(temperature=0.7, top_k=30, seed=1), SamplingParams(top_p=0.9, seed=2), SamplingParams()]
    logits = rows_of(3, 150, place, torch.bfloat16)
    metadata = make_metadata(params, vocab_size=150, histories=[[0] * 4] * 3, device=place.type)
    sampler = RandomSampler(150, place)
    assert sampler.steady_after(params[0]) == 0
    output, tensors = sampler.step(logits, metadata), RandomSampler(150, torch.device("cpu"))
    tensors._by_kernels = False
    on_host = make_metadata(params, vocab_size=150, histories=[[0] * 4] * 3)
    assert output.tokens.tolist() == tensors.step(logits.cpu(), on_host).tokens.tolist()
    assert output.parents.tolist() == [0, 1, 2]
    for found in (output, GreedySampler().step(logits, metadata)):
        assert torch.equal(found.peaks, logits.float().amax(1))
    assert torch.equal(GreedySampler().step(logits, metadata).tokens[:, 0], logits.float().argmax(1))
    scored = tensors.log_probs_of(logits, output.tokens)
    torch.testing.assert_close(sampler.log_probs_of(logits, output.tokens), scored, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_call_reads_its_inputs_where_they_lie():
    place, vocab = torch.device("cuda"), 32_000
    logits, given = rows_of(12, vocab, place, torch.bfloat16), parameters(MIX, vocab, place)
    device.draw_tokens(logits, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = device.draw_tokens(logits, **given)
    for turn in range(3):
        logits.copy_(rows_of(12, vocab, place, torch.bfloat16, scale=2.0 + turn))
        given["positions"] += 1
        given["temperature"].copy_(given["temperature"].roll(1))
        graph.replay()
        assert torch.equal(captured.tokens, device.draw_tokens(logits, **given).tokens)
