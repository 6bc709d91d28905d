"""A whole engine by random operations, short of memory on device and host, over a dense oracle."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_machine import TENANTS, EngineMachine, run_randomly

NUM_RUNS = int(os.environ.get("FOLO_SOAK_RUNS", "18"))
"""``nox -s soak`` makes more."""
POLICIES = ("fcfs", "priority", "fair")
PREEMPTIONS = ("auto", "swap", "recompute")

numbers = st.integers(0, 63)
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Each step that runs out of memory says so."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Serving(RuleBasedStateMachine):
    """The rules of ``EngineMachine``, for hypothesis to combine and to shrink what fails."""

    def __init__(self) -> None:
        super().__init__()
        self.machine: EngineMachine | None = None

    @initialize(policy=st.sampled_from(POLICIES), preemption=st.sampled_from(PREEMPTIONS), depth=st.integers(1, 3))
    def start(self, policy: str, preemption: str, depth: int) -> None:
        self.machine = EngineMachine(policy=policy, preemption=preemption, steps_in_flight=depth)

    @rule(prompt=prompts, max_tokens=st.integers(1, 12), priority=st.integers(0, 2), tenant=st.sampled_from(TENANTS))
    def add(self, prompt: list[int], max_tokens: int, priority: int, tenant: str) -> None:
        self.machine.add(prompt, max_tokens, priority, tenant)

    @rule(prompt=prompts, width=st.integers(1, 3), max_tokens=st.integers(1, 6))
    def add_tree(self, prompt: list[int], width: int, max_tokens: int) -> None:
        self.machine.add_tree(prompt, width, max_tokens)

    @rule(prompt=prompts, width=st.integers(1, 3), max_tokens=st.integers(1, 9))
    def add_search(self, prompt: list[int], width: int, max_tokens: int) -> None:
        self.machine.add_search(prompt, width, max_tokens)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.machine.step()
            self.machine.check()

    @rule(number=numbers)
    def fork(self, number: int) -> None:
        self.machine.fork(number)

    @rule(number=numbers)
    def abort(self, number: int) -> None:
        self.machine.abort(number)

    @rule(times=st.integers(1, 3))
    def run_out(self, times: int) -> None:
        self.machine.run_out(times)

    @rule()
    def reset(self) -> None:
        self.machine.reset()

    @precondition(lambda self: self.machine is not None)
    @invariant()
    def holds(self) -> None:
        self.machine.check()

    def teardown(self) -> None:
        if self.machine is not None:
            self.machine.finish()


TestServing = pytest.mark.slow(Serving.TestCase)
TestServing.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


@pytest.mark.slow
def test_random_serving_loses_nothing_and_changes_no_token() -> None:
    seen: dict[str, int] = {}
    for number in range(NUM_RUNS):
        machine = EngineMachine(
            seed=number,
            policy=POLICIES[number % 3],
            preemption=PREEMPTIONS[number // 3 % 3],
            steps_in_flight=1 + number // 9 % 3,
        )
        run_randomly(machine, 250, number)
        machine.finish()
        stats = machine.engine.stats()
        for name, count in [
            *machine.counts.items(),
            ("moved ahead", machine.beams.moved_ahead),
            ("ran behind", machine.beams.ran_behind),
            ("preemptions", stats.num_preemptions),
            ("swaps", stats.num_swaps),
            ("hits", stats.prefix_cache.num_hit_tokens),
            ("found again", stats.prefix_cache.num_resumed_tokens),
            ("evictions", stats.prefix_cache.num_evicted_blocks),
        ]:
            seen[name] = seen.get(name, 0) + count
    assert seen["preemptions"] > seen["swaps"] >= 20
    assert seen["search found"] > 50
    assert seen["moved ahead"] > 50
    assert seen["ran behind"] > 100
    for name in ("fork", "abort other", "abort swapped", "out of memory", "hits", "found again", "evictions"):
        assert seen.get(name), f"{name}: never happened in {seen}"
