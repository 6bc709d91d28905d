"""The kernels of beam search against its tensor operations: in Triton's interpreter, and compiled."""

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

from folo_beam import BeamParams, device, steps  # noqa: E402
from folo_beam.grid import Grid  # noqa: E402
from folo_beam.sampler import BeamSampler, Search  # noqa: E402
from folo_core.sequence import SequenceStatus  # noqa: E402
from folo_core.testing.builders import make_metadata, make_request  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of infinities
PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]
SMALL = device.Tuning(chunk=32, warps=4)


@pytest.fixture(params=PLACES)
def place(request) -> str:
    return request.param


def search_of(params: BeamParams, ends: tuple[int, ...], length: int, finished: list[tuple[float, int]]) -> Search:
    """A search whose rows have ``length`` tokens, and that has finished answers of these scores and lengths."""
    request = make_request("a", params)
    request.open_sequence(0).data.output_token_ids += [1] * length
    for number, (score, tokens) in enumerate(finished):
        sequence = request.open_sequence(number + 1)
        sequence.data.output_token_ids += [1] * tokens
        sequence.score, sequence.tag = score, 1
        sequence.transition(SequenceStatus.RUNNING)
        request.close_sequence(sequence, SequenceStatus.FINISHED_STOPPED)
    return Search(request, params, ends, None)


def compare(logits: torch.Tensor, scores: torch.Tensor, members: list[tuple[Search, range]], tuning) -> int:
    """Assert that both ways give the same rows; return how many."""
    params = [search.params for search, span in members for _ in span]
    metadata = make_metadata(params, vocab_size=logits.shape[1], device=logits.device.type)
    metadata.scores, metadata.tags = scores, torch.zeros_like(metadata.tags)
    step = device.Step.start(logits, scores, members, tuning=tuning)
    if logits.is_cuda:
        torch.cuda.synchronize()
    found = step.columns()
    expected = [column.cpu() for column in Grid.of(logits.float(), metadata, members).advance()]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert mine.tolist() == theirs.tolist()
    return len(found[0])


searches = st.fixed_dictionaries(
    {
        "length_penalty": st.sampled_from([0.0, 1.0, -1.0, 2.5]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "max_tokens": st.sampled_from([3, 4, 30]),
        "finished": st.lists(st.tuples(st.floats(-12, -0.5), st.integers(1, 3)), max_size=4),
        "first": st.booleans(),
    }
)


# The interpreter is too slow to shrink an example.
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    width=st.integers(1, 4), num_ends=st.integers(0, 2), each=st.lists(searches, min_size=1, max_size=2), data=st.data()
)
def test_any_searches_advance_as_tensors_do(width, num_ends, each, data):
    vocab = data.draw(st.sampled_from([5, 40, 70]))
    members, start = [], 0
    for drawn in each:
        fields = {**drawn, "width": width}
        rows = 1 if fields.pop("first") else width
        finished = fields.pop("finished")
        members.append((search_of(BeamParams(**fields), (2, 4)[:num_ends], 2, finished), range(start, start + rows)))
        start += rows
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(start, vocab, generator=generator) * 3
    logits[:, 1] = -math.inf
    logits[:, 2] += data.draw(st.sampled_from([0.0, 4.0]))
    scores = -torch.rand(start, generator=generator) * 5
    place = "cuda" if CUDA else "cpu"
    compare(logits.to(place), scores.to(place), members, SMALL)


def test_a_batch_of_wide_searches(place):
    count, width, vocab = (16, 8, 151_936) if place == "cuda" else (2, 5, 90)
    params = BeamParams(width=width, max_tokens=20)
    members = [
        (search_of(params, (2,), 3, [(-4.0, 3)] * number), range(number * width, number * width + width))
        for number in range(count)
    ]
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(count * width, vocab, generator=generator) * 3).to(place)
    logits[:, 2] += 9
    scores = -torch.rand(count * width, generator=generator).to(place)
    tuning = device.TUNING if place == "cuda" else SMALL
    assert compare(logits, scores, members, tuning) > count * width


def test_of_equals_the_earlier_row_and_the_lower_token_come_first(place):
    search = search_of(BeamParams(width=3, max_tokens=9), (), 1, [])
    step = device.Step.start(
        torch.zeros(3, 70, device=place), torch.zeros(3, device=place), [(search, range(3))], tuning=SMALL
    )
    if place == "cuda":
        torch.cuda.synchronize()
    parents, tokens, *_ = step.columns()
    assert (parents.tolist(), tokens.tolist()) == ([0, 0, 0], [0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_likeliest_tokens(place, dtype):
    rows, vocab = (64, 151_936) if place == "cuda" else (3, 90)
    logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 4).to(dtype).to(place)
    logits[0, 7:] = -math.inf
    ids, log_probs = device.likeliest(logits, 9, tuning=device.TUNING if place == "cuda" else SMALL)
    exact = logits.double().log_softmax(1)
    torch.testing.assert_close(log_probs.double(), exact.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_probs.double(), exact.topk(9).values, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 9 for row in ids.tolist())


def test_what_cannot_be_read_is_refused(place):
    with pytest.raises(ValueError, match="contiguous rows"):
        device.likeliest(torch.zeros(5, 5, device=place).T[:, ::2], 2)
    assert device.fits(16, 2)
    assert not device.fits(100, 1)


def test_the_sampler_steps_by_kernels_and_tensors_alike(place, monkeypatch):
    plain, diverse = BeamParams(width=3, max_tokens=9), BeamParams(width=2, num_groups=2, diversity_penalty=0.5)
    outputs = []
    for kernels in (False, True):
        monkeypatch.setattr(steps, "has_kernels", lambda _, on=kernels: on)
        beam, params = BeamSampler(), [plain, diverse]
        for name, each in zip("ab", params, strict=True):
            request = make_request(name, each)
            request.open_sequence(0)
            beam.add_request(request)
        metadata = make_metadata(params, vocab_size=90, request_ids=["a", "b"], device=place)
        logits = torch.randn(2, 90, generator=torch.Generator().manual_seed(4)).to(place)
        outputs.append(beam.step(logits, metadata))
    for name in ("parents", "tokens", "tags", "finished"):
        assert getattr(outputs[0], name).tolist() == getattr(outputs[1], name).tolist()
    torch.testing.assert_close(outputs[0].scores.cpu(), outputs[1].scores.cpu())
    assert BeamSampler.reads_any_dtype
