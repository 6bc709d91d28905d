"""Both schedulers through the engine: order, who yields, and that everybody finishes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_core import SamplingParams
from folo_core.engine.engine import Engine
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, fake_components


def run(engine: Engine) -> list[str]:
    """Return request ids in the order they finished."""
    order = []
    for _ in range(3000):
        order += [output.request_id for output in engine.step() if output.finished]
        engine.check_integrity()
        if not engine.has_unfinished_requests:
            return order
    message = "not done after 3,000 steps"
    raise AssertionError(message)


def test_both_are_found_by_name() -> None:
    assert {part.name for part in load_registry().all("schedulers")} >= {"fcfs", "priority"}


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", ["0", "1", "2", "3"]), ("priority", ["3", "1", "0", "2"])])
def test_one_place_serves_in_the_policys_order(policy: str, expected: list[str]) -> None:
    engine = Engine(fake_components(policy=policy, max_num_seqs=1))
    for place, priority in enumerate([2, 1, 2, 0]):
        engine.add_request(
            str(place), [1, 2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), priority=priority
        )
    assert run(engine) == expected


@settings(max_examples=30, deadline=None)
@given(
    priorities=st.lists(st.integers(0, 3), min_size=2, max_size=8),
    blocks=st.integers(8, 14),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_under_pressure_the_first_never_yields_and_all_finish(priorities: list[int], blocks: int, policy: str) -> None:
    model = FakeModel()
    engine = Engine(fake_components(model, policy=policy, num_blocks=blocks, max_num_seqs=8, max_model_len=32))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for place, priority in enumerate(priorities):
        engine.add_request(str(place), [place, 1, 2], params, priority=priority)
    first = str(min(range(len(priorities)), key=lambda i: (priorities[i] if policy == "priority" else 0, i)))
    request = engine.requests[first]
    assert len(run(engine)) == len(priorities)
    assert request.metrics.num_preemptions == 0


def test_preemption_takes_the_last_in_order() -> None:
    engine = Engine(fake_components(policy="priority", num_blocks=8, max_num_seqs=8, max_model_len=32))
    requests = {}
    for name, priority in {"late": 2, "mid": 1, "urgent": 0}.items():
        engine.add_request(
            name, [1, 2, 3], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), priority=priority
        )
        requests[name] = engine.requests[name]
    run(engine)
    preempted = {name: request.metrics.num_preemptions for name, request in requests.items()}
    assert preempted["urgent"] == 0
    assert preempted["late"] >= 1
