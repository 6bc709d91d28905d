"""Engine.fork: a running generation is branched in public, sharing its keys and values."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import assert_clean, greedy, make_engine, run, watch_pasts
from folo_core.async_engine import AsyncEngine
from folo_core.errors import ParamsError, RequestError
from folo_core.sampling_params import RequestOutputKind, SamplingParams
from folo_core.testing.fakes import FakeModel, fake_components

PROMPT = [5, 9, 2, 7, 1, 8, 3]


def started(steps: int, params: SamplingParams | None = None, **options):
    """An engine whose request ``a`` has run some steps, so that it has ``steps`` output tokens."""
    engine, model = make_engine(**options)
    engine.add_request("a", PROMPT, greedy(max_tokens=20, ignore_eos=True) if params is None else params)
    for _ in range(steps):
        engine.step()
    return engine, model


def continuation(model: FakeModel, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model.logits_after(tokens).argmax()))
    return tokens


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 12), at=st.integers(0, 12), blocks=st.sampled_from([16, 64]), chunk=st.sampled_from([4, 64])
)
def test_a_branch_goes_on_as_a_request_of_its_own_would(steps, at, blocks, chunk):
    engine, model = started(0, num_blocks=blocks, max_num_batched_tokens=chunk, max_num_seqs=4, max_model_len=40)
    while not engine.requests["a"].live[0].data.output_token_ids:
        engine.step()
    for _ in range(steps - 1):
        engine.step()
    have = engine.requests["a"].live[0].data.output_token_ids.copy()
    keep = min(at, len(have))
    seen = watch_pasts(model)
    # A bias sends the branch another way, so that it writes other keys and values than its source.
    other = greedy(max_tokens=20, ignore_eos=True, logit_bias={3: 100.0})
    engine.fork("a", "b", at=keep, params=other)
    engine.check_integrity()
    final = run(engine)
    assert final["a"].outputs[0].token_ids == continuation(model, PROMPT, 20)[len(PROMPT) :]
    assert final["b"].outputs[0].token_ids == have[:keep] + [3] * (20 - keep)
    assert seen
    assert_clean(engine)


def test_the_common_part_is_not_computed_again_and_its_blocks_are_shared():
    engine, model = started(6)
    ran = []
    model.before_forward = lambda ids: ran.append(len(ids))
    used = engine.state.kv.pool.num_usable - engine.state.kv.pool.num_free
    for name in "bcd":
        engine.fork("a", name)
    assert engine.state.kv.pool.num_usable - engine.state.kv.pool.num_free == used, "a fork takes no block"
    engine.step()
    assert ran == [4], "one token for each of the four"
    tables = [engine.requests[name].live[0].block_table.blocks for name in "abcd"]
    assert len({tuple(blocks[:-1]) for blocks in tables}) == 1
    assert len({blocks[-1] for blocks in tables}) == 4, "each writes a tail of its own"
    run(engine)
    assert_clean(engine)


def test_without_parameters_a_branch_draws_with_a_seed_of_its_own():
    engine, _ = started(3, SamplingParams(seed=5, max_tokens=16, ignore_eos=True, temperature=2.0))
    engine.fork("a", "b")
    engine.fork("a", "same", params=SamplingParams(seed=5, max_tokens=16, ignore_eos=True, temperature=2.0))
    final = run(engine)
    a, b, same = (final[name].outputs[0].token_ids for name in ("a", "b", "same"))
    assert a[:3] == b[:3]
    assert a != b
    assert a == same


def test_where_no_place_is_free_the_branch_waits_and_is_computed_anew():
    engine, model = started(4, max_num_seqs=1)
    engine.fork("a", "b", at=2)
    assert len(engine.state.waiting) == 1
    final = run(engine)
    assert final["b"].outputs[0].token_ids == final["a"].outputs[0].token_ids
    assert final["b"].outputs[0].token_ids == continuation(model, PROMPT, 20)[len(PROMPT) :]
    assert_clean(engine)


def test_a_branch_of_a_waiting_request_waits_beside_it():
    engine, _ = make_engine()
    engine.add_request("a", PROMPT, greedy())
    engine.fork("a", "b")
    final = run(engine)
    assert final["a"].outputs[0].token_ids == final["b"].outputs[0].token_ids


def test_a_branch_of_a_branch_before_any_step_and_the_end_of_the_one_between():
    engine, model = started(5)
    engine.fork("a", "b", at=4)
    engine.fork("b", "c", at=3)
    engine.abort("b")
    engine.check_integrity()
    final = run(engine)
    assert final["c"].outputs[0].token_ids == continuation(model, PROMPT, 20)[len(PROMPT) :]
    assert final["a"].outputs[0].token_ids == final["c"].outputs[0].token_ids
    assert_clean(engine)


def test_branches_survive_preemption():
    engine, model = started(6, num_blocks=20, max_model_len=64)
    engine.fork("a", "b", at=1, params=greedy(max_tokens=40, ignore_eos=True))
    engine.fork("a", "c", params=greedy(max_tokens=40, ignore_eos=True, logit_bias={3: 100.0}))
    first = engine.requests["a"].live[0].data.output_token_ids[:6]
    metrics = [request.metrics for request in engine.requests.values()]
    final = run(engine)
    assert sum(m.num_preemptions for m in metrics) > 0
    assert final["b"].outputs[0].token_ids == continuation(model, PROMPT, 40)[len(PROMPT) :]
    assert final["c"].outputs[0].token_ids == first + [3] * 34
    assert_clean(engine)


def test_text_log_probabilities_and_streams_begin_with_what_is_taken_over():
    params = greedy(max_tokens=9, ignore_eos=True, logprobs=2)
    engine, _ = started(5, params)
    engine.fork("a", "b", at=3)
    engine.fork("a", "c", params=attrs.evolve(params, output_kind=RequestOutputKind.DELTA))
    pieces: dict[str, list] = {"b": [], "c": []}
    final = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.request_id in pieces:
                pieces[output.request_id].append(output.outputs[0])
            if output.finished:
                final[output.request_id] = output.outputs[0]
    assert final["b"].text == final["a"].text == "".join(piece.text for piece in pieces["c"])
    assert len(final["b"].logprobs) == 9
    assert final["b"].cumulative_logprob == pytest.approx(final["a"].cumulative_logprob)
    assert len(pieces["c"][0].token_ids) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"request_id": "x"}, RequestError, "request_id: 'x': no such request"),
        ({"new_request_id": "a"}, RequestError, "request_id: 'a': a request of this id is not finished"),
        ({"at": 5}, RequestError, "at: 5: .* has 4 output tokens"),
        ({"at": -1}, RequestError, "at: -1"),
        ({"row": 1}, RequestError, "row: 1: .* has 1 live"),
        ({"params": greedy(max_tokens=4)}, ParamsError, "max_tokens: 4: the branch takes over 4 tokens"),
        ({"params": greedy(logprobs=1)}, ParamsError, "logprobs: 1: .* did not ask"),
        ({"params": greedy(stop_token_ids=[64])}, ParamsError, "stop_token_ids: 64"),
    ],
)
def test_what_cannot_be_branched_is_refused_and_changes_nothing(change, error, message):
    engine, model = started(4)
    with pytest.raises(error, match=message):
        engine.fork(**({"request_id": "a", "new_request_id": "b"} | change))
    assert set(engine.requests) == {"a"}
    assert run(engine)["a"].outputs[0].token_ids == continuation(model, PROMPT, 20)[len(PROMPT) :]
    assert_clean(engine)


def test_a_full_queue_refuses_a_branch():
    engine, _ = started(2, max_num_seqs=1, max_waiting_requests=1)
    engine.add_request("waits", PROMPT, greedy())
    with pytest.raises(RequestError, match="max_waiting_requests=1"):
        engine.fork("a", "b")


def test_the_async_twin_streams_the_branch_and_leaves_the_source_alone():
    async def talk():
        async with AsyncEngine(fake_components()) as engine:
            source = engine.generate(PROMPT, greedy(max_tokens=60, ignore_eos=True), "a")
            first = await anext(source)
            branch = [output async for output in engine.fork("a", at=1, params=greedy(max_tokens=12, ignore_eos=True))]
            async for output in engine.fork("a", "left", at=0):
                assert not output.finished
                break
            last = [output async for output in source][-1]
            with pytest.raises(RequestError, match="no such request"):
                await anext(engine.fork("a"))
            return first, branch, last

    first, branch, last = asyncio.run(talk())
    assert not first.finished
    assert branch[-1].finished
    assert branch[-1].outputs[0].token_ids == last.outputs[0].token_ids[:12]
    assert last.outputs[0].finish_reason == "length"
