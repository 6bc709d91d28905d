"""Faults inside a step: each first shows that it struck, then that only its own request suffered."""

from __future__ import annotations

import logging
import time
from typing import Any

import attrs
import pytest
import torch

from engines import (
    ObserverPlugin,
    ProcessorPlugin,
    SamplerPlugin,
    SchedulerPlugin,
    TreeParams,
    TreeSampler,
    assert_clean,
    greedy,
    make_engine,
    run,
)
from folo_core.errors import FoloError, PluginError
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.interface import SchedulerOutput

VICTIM, NEIGHBOUR = [9, 9, 9], [4, 5, 6]


def neighbour_alone(**options: Any) -> Any:
    engine, _ = make_engine(**options)
    engine.add_request("n", NEIGHBOUR, greedy(max_tokens=10, logprobs=3, ignore_eos=True))
    return run(engine)["n"].outputs[0]


def assert_neighbour_unharmed(final: dict[str, Any], **options: Any) -> None:
    alone, beside = neighbour_alone(**options), final["n"].outputs[0]
    assert beside.token_ids == alone.token_ids
    assert beside.logprobs == alone.logprobs, "bit-equal"


def run_beside_neighbour(engine: Any, params: SamplingParams) -> dict[str, Any]:
    engine.add_request("n", NEIGHBOUR, greedy(max_tokens=10, logprobs=3, ignore_eos=True))
    engine.add_request("v", VICTIM, params)
    final = run(engine)
    assert_clean(engine)
    return final


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize("after", [3, 6])
@pytest.mark.parametrize("params", [greedy(max_tokens=10), SamplingParams(max_tokens=10, top_p=0.9, seed=3)])
def test_a_poisoned_logits_row_ends_its_own_request(
    value: float, reason: str, after: int, params: SamplingParams
) -> None:
    engine, model = make_engine()
    struck = []

    def poison(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        for row, past in enumerate(pasts):
            if past[:3] == VICTIM and len(past) >= after:
                struck.append(row)
                logits[row, 5] = value
        return logits

    model.edit_logits = poison
    final = run_beside_neighbour(engine, attrs.evolve(params, ignore_eos=True))
    assert struck
    assert final["v"].outputs[0].finish_reason == "error"
    assert len(final["v"].outputs[0].token_ids) == after - 3
    assert reason in str(final["v"].error)
    assert_neighbour_unharmed(final)


def test_a_fully_masked_row_ends_its_own_request() -> None:
    processor = ProcessorPlugin(
        lambda params: params.max_tokens == 7, lambda logits, metadata: logits.fill_(float("-inf"))
    )
    engine, _ = make_engine(plugins=[processor])
    final = run_beside_neighbour(engine, greedy(max_tokens=7))
    assert final["v"].outputs[0].finish_reason == "error"
    assert "every token is masked" in str(final["v"].error)
    assert_neighbour_unharmed(final)


def test_blocks_of_a_failed_request_are_zeroed_before_anyone_gets_them() -> None:
    engine, model = make_engine(num_blocks=11, max_model_len=40)

    def poison(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        for row, past in enumerate(pasts):
            if past[:3] == VICTIM:
                logits[row] = float("nan")
        return logits

    model.edit_logits = poison
    engine.add_request("v", VICTIM, greedy())
    cache = engine.executor.runner.backend.cache
    engine.step()
    written = (cache == 9).any(dim=1)
    assert written.any(), "the fault left something behind"
    engine.step()
    assert not (cache == 9).any()
    assert_clean(engine)


@pytest.mark.parametrize("fault", ["raises", "shape"])
def test_a_faulty_processor_ends_only_the_requests_that_use_it(fault: str) -> None:
    def apply(logits: torch.Tensor, metadata: Any) -> torch.Tensor:
        assert set(metadata.request_ids) == {"v"}, "a processor gets only the rows that ask for it"
        if metadata.positions[0] < 5:
            return logits + 0
        if fault == "raises":
            message = "the processor broke"
            raise RuntimeError(message)
        return logits[:, :3]

    engine, _ = make_engine(plugins=[ProcessorPlugin(lambda params: params.max_tokens == 7, apply)])
    final = run_beside_neighbour(engine, greedy(max_tokens=7, ignore_eos=True))
    error = final["v"].error
    assert isinstance(error, PluginError)
    assert error.plugin == "test-processor"
    assert "test-processor" in str(error)
    assert ("the processor broke" if fault == "raises" else "expected (1, 64)") in str(error)
    assert len(final["v"].outputs[0].token_ids) == 2
    assert_neighbour_unharmed(final)


class BrokenSampler(TreeSampler):
    """Works for two steps, then does what it is told."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.steps = 0

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:  # noqa: C901 (a case for each fault)
        self.steps += 1
        rows = metadata.num_rows
        parents, tokens = torch.arange(rows), logits.argmax(1)[:, None]
        if self.steps <= 2:
            return SamplerOutput(parents=parents, tokens=tokens)
        match self.fault:
            case "raises":
                message = "the sampler broke"
                raise ZeroDivisionError(message)
            case "one-dimensional tokens":
                tokens = tokens[:, 0]
            case "fewer parents":
                parents = parents[:0]
            case "foreign parent":
                parents = parents + rows
            case "negative parent":
                parents = parents - 1
            case "token beyond the vocabulary":
                tokens = tokens + 64
            case "no token":
                tokens = tokens * 0 - 1
            case "finished too short":
                return SamplerOutput(parents=parents, tokens=tokens, finished=torch.zeros(rows + 1, dtype=torch.bool))
            case "not a tensor":
                return None  # type: ignore[return-value]
        return SamplerOutput(parents=parents, tokens=tokens)

    def finish(self, request: Any) -> list[Any]:
        match self.fault:
            case "finish raises":
                message = "ranking broke"
                raise ZeroDivisionError(message)
            case "finish returns another's":
                return [attrs.evolve(sequence, seq_id=sequence.seq_id + 100) for sequence in request.finished]
            case "finish returns one twice":
                return [*request.finished, *request.finished]
        return super().finish(request)


@pytest.mark.parametrize(
    "fault",
    [
        "raises", "one-dimensional tokens", "fewer parents", "foreign parent", "negative parent",
        "token beyond the vocabulary", "no token", "finished too short", "not a tensor",
    ],
)  # fmt: skip
def test_a_faulty_sampler_ends_only_its_own_requests(fault: str) -> None:
    engine, _ = make_engine(plugins=[SamplerPlugin(BrokenSampler(fault))])
    final = run_beside_neighbour(engine, TreeParams(max_tokens=9, ignore_eos=True))
    error = final["v"].error
    assert isinstance(error, PluginError)
    assert error.plugin == "test-sampler"
    assert "test-sampler" in str(error)
    assert "sampler" in str(error)
    assert final["v"].outputs[0].finish_reason == "error"
    assert len(final["v"].outputs[0].token_ids) == 2
    assert_neighbour_unharmed(final)


@pytest.mark.parametrize("fault", ["finish raises", "finish returns another's", "finish returns one twice"])
def test_a_sampler_that_fails_to_rank_costs_the_order_but_not_the_answers(fault: str) -> None:
    engine, _ = make_engine(plugins=[SamplerPlugin(BrokenSampler(fault))])
    final = run_beside_neighbour(engine, TreeParams(max_tokens=2, ignore_eos=True))
    assert ("ranking broke" if fault == "finish raises" else "expected some of the request's own") in str(
        final["v"].error
    )
    assert final["v"].error.plugin == "test-sampler"
    assert len(final["v"].outputs[0].token_ids) == 2
    assert_neighbour_unharmed(final)


def test_more_rows_than_were_reserved_end_their_request_alone() -> None:
    class Greedy(TreeSampler):
        def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
            parents = torch.arange(metadata.num_rows).repeat_interleave(2)
            return SamplerOutput(parents=parents, tokens=logits[parents].argmax(1)[:, None])

    engine, _ = make_engine(plugins=[SamplerPlugin(Greedy())])
    final = run_beside_neighbour(engine, TreeParams(width=3, max_tokens=9, ignore_eos=True))
    assert "goes on with 4 rows, num_sequences of its TreeParams reserved 3" in str(final["v"].error)
    assert_neighbour_unharmed(final)


def test_a_failing_forward_ends_the_requests_in_the_step_and_the_engine_lives() -> None:
    engine, model = make_engine()
    calls = []

    def fail(input_ids: torch.Tensor) -> None:
        calls.append(len(input_ids))
        if len(calls) == 2:
            message = "the device is gone"
            raise RuntimeError(message)

    model.before_forward = fail
    engine.add_request("a", [1, 2], greedy(ignore_eos=True))
    engine.add_request("b", [3, 4], greedy(ignore_eos=True))
    final = run(engine)
    assert {output.outputs[0].finish_reason for output in final.values()} == {"error"}
    assert "FakeForCausalLM" in str(final["a"].error)
    assert "the device is gone" in str(final["a"].error)
    assert_clean(engine)
    engine.add_request("c", [1, 2], greedy())
    assert run(engine)["c"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)


class BrokenScheduler:
    """First come first served, until it breaks."""

    def __init__(self, fault: str) -> None:
        from folo_schedulers.ordered import FCFSScheduler

        self.inner = FCFSScheduler(None)
        self.fault = fault
        self.steps = 0

    def order(self, request: Any) -> Any:
        return self.inner.order(request)

    def schedule(self, state: Any, budget: Any) -> SchedulerOutput:
        self.steps += 1
        if self.steps > 3 and self.fault == "raises":
            message = "the scheduler broke"
            raise KeyError(message)
        if self.steps > 3 and self.fault == "idles":
            return SchedulerOutput()
        return self.inner.schedule(state, budget)


def test_a_scheduler_that_raises_ends_the_requests_and_is_named() -> None:
    engine, _model = make_engine(plugins=[SchedulerPlugin(BrokenScheduler("raises"))], policy="test")
    engine.add_request("a", [1, 2], greedy(ignore_eos=True))
    final = run(engine)
    assert isinstance(final["a"].error, PluginError)
    assert "test-scheduler" in str(final["a"].error)
    assert len(final["a"].outputs[0].token_ids) == 3


def test_a_scheduler_that_never_schedules_is_named_and_nobody_waits_forever() -> None:
    engine, _ = make_engine(plugins=[SchedulerPlugin(BrokenScheduler("idles"))], policy="test")
    engine.add_request("a", [1, 2], greedy(ignore_eos=True))
    engine.add_request("b", [1, 2], greedy(ignore_eos=True))
    final = run(engine)
    assert "'test' makes no progress" in str(final["a"].error)
    assert "'test' makes no progress" in str(final["b"].error)


def test_an_observer_that_raises_is_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ObserverPlugin):
        def on_step(self, record: Any) -> None:
            super().on_step(record)
            message = "the observer broke"
            raise RuntimeError(message)

    observer = Broken()
    engine, _ = make_engine(plugins=[observer])
    with caplog.at_level(logging.ERROR):
        final = run_beside_neighbour(engine, greedy())
    assert len(observer.records) == 1
    assert "is dropped" in caplog.text
    assert_neighbour_unharmed(final)


@pytest.mark.parametrize("where", ["sampler", "model"])
def test_a_part_that_hangs_is_interrupted_and_named(where: str) -> None:
    hung = []

    def hang(*_: Any) -> Any:
        hung.append(time.monotonic())
        while True:
            time.sleep(0.001)

    sampler = TreeSampler()
    engine, model = make_engine(plugins=[SamplerPlugin(sampler)], step_timeout_s=0.3)
    engine.add_request("v", VICTIM, TreeParams(max_tokens=4, ignore_eos=True))
    if where == "sampler":
        sampler.step = hang
    else:
        model.before_forward = hang
    final = run(engine)
    assert len(hung) == 1
    assert ("test-sampler" if where == "sampler" else "FakeForCausalLM") in str(final["v"].error)
    assert isinstance(final["v"].error, FoloError)
    model.before_forward = None
    engine.add_request("n", NEIGHBOUR, greedy(max_tokens=10, logprobs=3, ignore_eos=True))
    assert_neighbour_unharmed(run(engine))
    assert_clean(engine)


def test_steps_in_time_are_never_interrupted() -> None:
    engine, _model = make_engine(step_timeout_s=5.0)
    engine.add_request("a", [1, 2], greedy(max_tokens=40, ignore_eos=True))
    assert run(engine)["a"].outputs[0].finish_reason == "length"


def test_ctrl_c_in_a_step_leaves_an_engine_that_can_go_on() -> None:
    engine, model = make_engine()
    engine.add_request("done", [8], greedy(max_tokens=1))
    engine.add_request("a", [1, 2], greedy(max_tokens=6, ignore_eos=True))
    engine.step()
    calls = []

    def interrupt(_: torch.Tensor) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert calls
    model.before_forward = None
    engine.abort("a")
    engine.add_request("b", [1, 2], greedy())
    assert run(engine)["b"].outputs[0].token_ids == model.expected_tokens([1, 2], 8)
    assert_clean(engine)


def test_ctrl_c_before_a_step_runs_still_lets_a_failed_requests_blocks_be_zeroed() -> None:
    engine, model = make_engine(num_blocks=11, max_model_len=40)
    model.edit_logits = lambda logits, pasts: logits.fill_(float("nan"))
    engine.add_request("v", VICTIM, greedy())
    engine.step()
    cache = engine.executor.runner.backend.cache
    assert (cache == 9).any(), "the fault left something behind"
    submit = engine.executor.submit

    def interrupt(scheduled: SchedulerOutput) -> Any:
        assert scheduled.zero_blocks
        raise KeyboardInterrupt

    engine.executor.submit = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.executor.submit = submit
    engine.step()
    assert not (cache == 9).any()
    assert_clean(engine)
