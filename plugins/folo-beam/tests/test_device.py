"""The kernels of beam search against its tensor operations: in Triton's interpreter, and compiled."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from folo_beam import BeamParams, ahead, device, steps  # noqa: E402
from folo_beam.grid import Grid  # noqa: E402
from folo_beam.sampler import BeamSampler, Search  # noqa: E402
from folo_core.engine.engine import Engine  # noqa: E402
from folo_core.sequence import SequenceStatus  # noqa: E402
from folo_core.testing.builders import make_metadata, make_request  # noqa: E402
from folo_core.testing.fakes import fake_components  # noqa: E402

if TYPE_CHECKING:
    from folo_core.sampling.interface import SamplerOutput
    from folo_core.sampling.metadata import SamplingMetadata

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of infinities
PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]
PLACE = "cuda" if CUDA else "cpu"
SMALL = device.Tuning(chunk=32, warps=4)


@pytest.fixture(params=PLACES)
def place(request) -> str:
    return request.param


def search_of(
    params: BeamParams, ends: tuple[int, ...], length: int, finished: list[tuple[float, int]], lane: int = 0
) -> Search:
    """A search whose rows have ``length`` tokens, and that has finished answers of these scores and lengths."""
    request = make_request("a", params)
    request.open_sequence(0).data.output_token_ids += [1] * length
    for number, (score, tokens) in enumerate(finished):
        sequence = request.open_sequence(number + 1)
        sequence.data.output_token_ids += [1] * tokens
        sequence.score, sequence.tag = score, 1
        sequence.transition(SequenceStatus.RUNNING)
        request.close_sequence(sequence, SequenceStatus.FINISHED_STOPPED)
    return Search(request, params, ends, None, lane)


def metadata_of(members: list[tuple[Search, range]], logits: torch.Tensor, scores: torch.Tensor) -> SamplingMetadata:
    """What the rows of some searches are sampled with; each has a prompt of one token."""
    params = [search.params for search, span in members for _ in span]
    lengths = [len(search.request.live[0].data.output_token_ids) for search, span in members for _ in span]
    metadata = make_metadata(
        params,
        vocab_size=logits.shape[1],
        device=logits.device.type,
        request_ids=[search.request.request_id for search, span in members for _ in span],
        histories=[[0] * (1 + length) for length in lengths],
        prompt_lengths=[1] * len(params),
    )
    metadata.scores, metadata.tags = scores, torch.zeros_like(metadata.tags)
    return metadata


def compare(logits: torch.Tensor, scores: torch.Tensor, members: list[tuple[Search, range]], tuning) -> int:
    """Assert that both ways give the same rows; return how many."""
    metadata = metadata_of(members, logits, scores)
    step = device.Step.start(logits, metadata, members, tuning=tuning)
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
    compare(logits.to(PLACE), scores.to(PLACE), members, SMALL)


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
    logits, members = torch.zeros(3, 70, device=place), [(search, range(3))]
    metadata = metadata_of(members, logits, torch.zeros(3, device=place))
    step = device.Step.start(logits, metadata, members, tuning=SMALL)
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


def family(output: SamplerOutput, span: range, rows: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return parents and tokens of a search's rows that go on, and of its children that end, in any order."""
    parents, tokens, ended = output.parents.tolist(), output.tokens[:, 0].tolist(), output.finished.tolist()
    going = [(parents[row], tokens[row]) for row in span if not ended[row]]
    ends = [(parents[rows + row], tokens[rows + row]) for row in span if parents[rows + row] >= 0]
    for row in span:
        children = [parent for parent, _ in going if parent == row]
        assert not children or parents[row] == row, "the first child of a row goes on in its place"
        assert not ended[row] or parents[row] == row
    return sorted(going), sorted(ends)


def advance_both_ways(members: list[tuple[Search, range]], logits: torch.Tensor, scores: torch.Tensor, pools) -> int:
    """Assert that a step ahead has the children that a step of the host has; return how many go on."""
    metadata, rows = metadata_of(members, logits, scores), len(logits)
    metadata.is_behind = np.array([search.request.finished == [] for search, span in members for _ in span])
    output = ahead.go_on(logits, metadata, [members], pools, tuning=SMALL)
    given = metadata_of(members, logits, scores)
    parents, tokens, _, totals, _, ends = (c.cpu().tolist() for c in Grid.of(logits.float(), given, members).advance())
    count = 0
    for _, span in members:
        mine = [place for place, parent in enumerate(parents) if parent in span]
        expected = [sorted((parents[i], tokens[i]) for i in mine if ends[i] == end) for end in (False, True)]
        assert list(family(output, span, rows)) == expected
        count += len(expected[0])
    found = sorted(zip(output.parents.tolist(), output.tokens[:, 0].tolist(), output.scores.tolist(), strict=True))
    for parent, token, total in zip(parents, tokens, totals, strict=True):
        assert any((p, t) == (parent, token) and abs(score - total) < 1e-4 for p, t, score in found)
    return count


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(width=st.integers(1, 4), each=st.lists(searches, min_size=1, max_size=2), seed=st.integers(0, 999))
def test_a_step_ahead_has_the_children_of_a_step_of_the_host(width, each, seed):
    members = []
    for number, drawn in enumerate(each):
        fields = {**drawn, "width": width}
        fields.pop("first")
        finished = fields.pop("finished")
        search = search_of(BeamParams(**fields), (2,), 2, finished or [(-3.0, 1)], number)
        members.append((attrs.evolve(search, request=named(search.request, str(number))), members_span(number, width)))
    generator = torch.Generator().manual_seed(seed)
    logits, scores = torch.randn(len(each) * width, 40, generator=generator) * 3, -torch.rand(len(each) * width) * 5
    logits[:, 2] += seed % 3 * 2
    advance_both_ways(members, logits.to(PLACE), scores.to(PLACE), ahead.Pools())


def named(request, name: str):
    return attrs.evolve(request, request_id=name)


def members_span(number: int, width: int) -> range:
    return range(number * width, number * width + width)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_what_has_finished_is_kept_on_the_device(place, early_stopping):
    """A search of several steps of which the host learns nothing goes as one of which it learns all."""
    params = BeamParams(width=3, max_tokens=12, early_stopping=early_stopping, length_penalty=0.7)
    pools, span = ahead.Pools(), range(3)
    finished, scores, goes_on = [], torch.tensor([-0.5, -1.0, -1.5], device=place), []
    for length in range(2, 9):
        logits = (torch.randn(3, 40, generator=torch.Generator().manual_seed(length)) * 2).to(place)
        logits[:, 2] += 2.5
        search = search_of(params, (2,), length, finished)
        metadata = metadata_of([(search, span)], logits, scores)
        metadata.is_behind = np.full(3, length > 2)
        output = ahead.go_on(logits, metadata, [[(search, span)]], pools, tuning=SMALL)
        expected = Grid.of(logits.float(), metadata_of([(search, span)], logits, scores), [(search, span)]).advance()
        ends = expected[5].cpu().tolist()
        children = list(zip(expected[0].tolist(), expected[1].tolist(), strict=True))
        assert list(family(output, span, 3)) == [
            sorted(c for c, end in zip(children, ends, strict=True) if end == kind) for kind in (False, True)
        ]
        finished += [(total, length + 1) for total, end in zip(expected[3].tolist(), ends, strict=True) if end]
        goes_on.append(not all(ends))
        if not goes_on[-1]:
            break
        scores = output.scores[:3]
    assert len(finished) > 2
    assert len(goes_on) > 2


@pytest.mark.skipif(CUDA, reason="kernels are compiled here; tests/end_to_end/test_gpu_strategies.py runs them")
def test_searches_that_run_ahead_of_the_host_answer_as_in_step(monkeypatch):
    """An engine on the CPU, with the kernels interpreted: half of the searches are ahead of what the host knows."""
    monkeypatch.setattr(steps, "has_kernels", lambda _: True)
    behind: list[bool] = []
    go_on, start = ahead.go_on, device.Step.start

    def watched(logits, metadata, *args):
        behind.extend(metadata.is_behind.tolist())
        return go_on(logits, metadata, *args, tuning=SMALL)

    monkeypatch.setattr(device.Step, "start", lambda *args: start(*args, tuning=SMALL))

    monkeypatch.setattr(ahead, "go_on", watched)
    answers = []
    for run_ahead in (False, True):
        engine = Engine(fake_components(run_ahead=run_ahead, max_num_seqs=16))
        for number, prompt in enumerate([[1, 2, 3], [9, 8, 7, 6, 5]]):
            params = BeamParams(
                width=2, max_tokens=6 + number, n=2, stop_token_ids=[number * 7], early_stopping=number == 0
            )
            engine.add_request(str(number), prompt, params)
        done = {}
        while engine.has_unfinished_requests:
            done |= {output.request_id: output for output in engine.step() if output.finished}
            engine.check_integrity()
        answers.append({name: [(o.token_ids, o.score, o.finish_reason) for o in done[name].outputs] for name in "01"})
        assert run_ahead == bool(behind)
    assert answers[0] == answers[1]
    assert behind.count(True) > 10
    assert engine.state.kv.pool.num_free + engine.state.kv.pool.num_cached == engine.state.kv.pool.num_usable
