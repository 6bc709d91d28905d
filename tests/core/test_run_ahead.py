"""Steps that are scheduled before the host knows what the step before them sampled."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import DeferredExecutor, ProcessorPlugin, TreeParams, TreeSampler, assert_clean, greedy, make_engine, run
from engines import SamplerPlugin as Offers
from folo_best_of.params import BestOfParams
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine
    from folo_core.outputs import RequestOutput

SMALL: dict[str, Any] = {"max_num_batched_tokens": 6, "max_num_seqs": 6, "max_model_len": 40}


def answers(final: dict[str, RequestOutput]) -> dict[str, Any]:
    """What callers see of each request, whenever it came."""
    return {
        name: [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]
        for name, output in final.items()
    }


def most_pending(engine: Engine) -> int:
    return max((s.num_pending for r in engine.requests.values() for s in r.live), default=0)


def mixed_params(r: random.Random, number: int) -> SamplingParams:
    """Requests of every kind: those that run ahead, and those that cannot."""
    fields: dict[str, Any] = {"max_tokens": r.randint(1, 14), "ignore_eos": r.random() < 0.5}
    kind = number % 6
    if kind == 0:
        return greedy(**fields)
    if kind == 1:
        top_k, top_p = r.choice([-1, 5]), r.choice([1.0, 0.7])
        return SamplingParams(temperature=0.9, seed=number, top_k=top_k, top_p=top_p, **fields)
    if kind == 2:
        return greedy(stop_token_ids=[r.randrange(63) for _ in range(8)], **fields)
    if kind == 3:
        return greedy(repetition_penalty=1.3, **fields)
    if kind == 4:
        return greedy(logprobs=2, **fields)
    return BestOfParams(temperature=1.0, seed=number, n=2, best_of=3, **fields)


def serve(engine: Engine, seed: int, count: int = 14) -> dict[str, Any]:
    r = random.Random(seed)
    for number in range(count):
        prompt = [r.randrange(60) for _ in range(r.randint(1, 16))]
        engine.add_request(str(number), prompt, mixed_params(r, number))
    return answers(run(engine))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([18, 24, 80]),
    swap=st.sampled_from(["0", "256"]),
    prefixes=st.booleans(),
)
def test_running_ahead_changes_no_answer(seed, blocks, swap, prefixes):
    options = SMALL | {"num_blocks": blocks, "swap_space": swap, "enable_prefix_caching": prefixes}
    expected = serve(make_engine(run_ahead=False, **options)[0], seed)
    engine, _ = make_engine(run_ahead=True, **options)
    assert serve(engine, seed) == expected
    assert_clean(engine)


def test_the_next_step_starts_before_the_host_knows_the_token():
    engine, model = make_engine(run_ahead=True)
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=6, ignore_eos=True))
    assert engine.step() == []
    assert most_pending(engine) == 1
    outputs = engine.step()
    assert most_pending(engine) == 1
    assert outputs[0].outputs[0].token_ids == model.expected_tokens([1, 2, 3], 1)
    assert len(engine._in_flight) == 1


def test_the_length_is_known_ahead_and_no_token_is_computed_in_vain():
    engine, model = make_engine(run_ahead=True)
    ran: list[int] = []
    model.before_forward = lambda ids: ran.append(len(ids))
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=6, ignore_eos=True))
    run(engine)
    assert sum(ran) == 3 + 5


def test_a_stop_is_noticed_one_token_late_and_that_token_is_dropped():
    engine, model = make_engine(run_ahead=True)
    expected = model.expected_tokens([1, 2, 3], 10)
    ran: list[int] = []
    model.before_forward = lambda ids: ran.append(len(ids))
    stop = next(token for place, token in enumerate(expected) if place >= 2 and token not in expected[:place])
    length = expected.index(stop) + 1
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=10, ignore_eos=True, stop_token_ids=[stop]))
    final = run(engine)
    assert final["a"].outputs[0].token_ids == expected[:length]
    assert sum(ran) == 3 + length, "the step after the last token was under way already"
    assert_clean(engine)


def test_a_row_of_nan_ends_its_request_a_step_late_and_no_other():
    engine, model = make_engine(run_ahead=True)

    def poison(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        for row, past in enumerate(pasts):
            if past[:1] == [7] and len(past) >= 5:
                logits[row, 3] = math.nan
        return logits

    model.edit_logits = poison
    for first in (5, 7, 9):
        engine.add_request(str(first), [first, 2, 3], greedy(max_tokens=8, ignore_eos=True))
    final = run(engine)
    assert "nan" in str(final["7"].error)
    assert len(final["7"].outputs[0].token_ids) == 2
    for first in (5, 9):
        assert final[str(first)].outputs[0].token_ids == model.expected_tokens([first, 2, 3], 8)[:8]
        assert final[str(first)].error is None
    assert_clean(engine)


class Unsteady(TreeSampler):
    """Promises what it does not keep."""

    def steady_after(self, params: SamplingParams) -> int:
        return 0

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        parents = torch.arange(metadata.num_rows)
        return SamplerOutput(parents=parents, tokens=torch.ones((metadata.num_rows, 2), dtype=torch.int64))


class Foreign(Unsteady):
    """Answers with a token that no vocabulary has; the host learns of it when the next step has begun."""

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        parents = torch.arange(metadata.num_rows)
        return SamplerOutput(parents=parents, tokens=torch.full((metadata.num_rows, 1), 999))


def test_a_late_answer_that_cannot_be_true_ends_its_own_requests():
    engine, model = make_engine(run_ahead=True, plugins=[Offers(Foreign())])
    engine.add_request("bad", [1, 2], TreeParams(max_tokens=5))
    engine.add_request("good", [3, 4], greedy(max_tokens=5, ignore_eos=True))
    final = run(engine)
    assert "leave the vocabulary" in str(final["bad"].error)
    assert final["good"].outputs[0].token_ids == model.expected_tokens([3, 4], 5)[:5]
    assert final["good"].error is None
    assert_clean(engine)


def test_a_sampler_that_breaks_its_promise_ends_its_own_requests():
    engine, model = make_engine(run_ahead=True, plugins=[Offers(Unsteady())])
    engine.add_request("bad", [1, 2], TreeParams(max_tokens=5))
    engine.add_request("good", [3, 4], greedy(max_tokens=5, ignore_eos=True))
    final = run(engine)
    assert "it is not steady" in str(final["bad"].error)
    assert final["good"].outputs[0].token_ids == model.expected_tokens([3, 4], 5)
    assert_clean(engine)


@pytest.mark.parametrize("fields", [{"logprobs": 1}, {"prompt_logprobs": 1}, {"repetition_penalty": 1.2}])
def test_what_needs_the_host_stays_in_step_with_it(fields):
    engine, _ = make_engine(run_ahead=True)
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=6, ignore_eos=True, **fields))
    assert engine.requests["a"].steady_after is None
    while engine.has_unfinished_requests:
        engine.step()
        assert most_pending(engine) == 0


def test_a_processor_that_works_on_the_device_alone_runs_ahead():
    def push(logits: torch.Tensor, metadata: Any) -> torch.Tensor:
        logits[:, 11] = 1000.0
        return logits

    processor = ProcessorPlugin(lambda params: True, push)
    processor.graph_safe = True
    engine, _ = make_engine(run_ahead=True, plugins=[processor])
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=4, ignore_eos=True))
    engine.step()
    assert most_pending(engine) == 1
    assert run(engine)["a"].outputs[0].token_ids == [11] * 4


def test_candidates_of_one_request_end_one_by_one_while_it_runs_ahead():
    params = BestOfParams(n=4, best_of=4, temperature=1.5, seed=3, max_tokens=12, stop_token_ids=list(range(12)))
    found = []
    for ahead in (False, True):
        engine, _ = make_engine(run_ahead=ahead, max_num_seqs=8)
        engine.add_request("a", [4, 5, 6], params)
        pending = 0
        final: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests:
            final |= {output.request_id: output for output in engine.step() if output.finished}
            pending = max(pending, most_pending(engine))
            engine.check_integrity()
        assert bool(pending) is ahead
        found.append(answers(final))
        assert_clean(engine)
    assert found[0] == found[1]
    lengths = {len(token_ids) for token_ids, *_ in found[0]["a"]}
    assert len(lengths) > 1, "the candidates end at different steps"


def test_deeper_flights_change_no_answer_either():
    options = SMALL | {"num_blocks": 20}
    expected = serve(make_engine(run_ahead=False, **options)[0], 5)
    engine, _ = make_engine(plugins=[DeferredExecutor(3)], executor="deferred", **options)
    assert serve(engine, 5) == expected
    assert_clean(engine)


def test_scores_are_right_where_steps_ahead_and_in_step_alternate():
    """A request that waits for the host joins and leaves the batch of one that runs ahead."""
    found = []
    for ahead in (False, True):
        engine, _ = make_engine(run_ahead=ahead, max_num_seqs=16)
        params = BestOfParams(n=3, best_of=3, temperature=1.0, seed=4, max_tokens=20, ignore_eos=True)
        engine.add_request("a", [4, 5, 6], params)
        for number in range(4):
            params = greedy(max_tokens=2 + number, logprobs=1, ignore_eos=True)
            engine.add_request(f"wait-{number}", [7, number], params)
            for _ in range(4):
                engine.step()
        final = run(engine)
        found.append([(o.token_ids, round(o.score or 0.0, 4)) for o in final["a"].outputs])
        assert_clean(engine)
    assert found[0] == found[1]
