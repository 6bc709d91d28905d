"""The schedulers through the engine and step by step: order, who yields to whom, and what each tenant gets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folo_core import SamplingParams
from folo_core.config import SchedulerConfig
from folo_core.engine.engine import Engine
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, fake_components
from folo_schedulers.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from planning import SIZE, Desk


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


# --- step by step, without an engine --------------------------------------------------------------------------------


def desk_for(policy: str, **options: Any) -> tuple[Desk, Any]:
    """Return a state and the scheduler that plans its steps."""
    scheduler = load_registry().get("schedulers", policy).build(SchedulerConfig(policy=policy))
    return Desk(order=scheduler.order, **options), scheduler


def steps(desk: Desk, scheduler: Any, count: int) -> list[Any]:
    return [desk.step(scheduler) for _ in range(count)]


def preempted(output: Any) -> list[str]:
    return [request.request_id for request in output.preempted]


def test_each_scheduler_keeps_its_configuration_and_orders_by_what_it_is_named_for() -> None:
    desk, fcfs = desk_for("fcfs")
    request = desk.ask("a", [1], priority=3)
    assert fcfs.order(request) == (0,)
    assert desk_for("priority")[1].order(request) == (3, 0)
    assert desk_for("fair")[1].order(request) == (0,)
    for policy in ("fcfs", "priority", "fair"):
        assert desk_for(policy)[1].config == SchedulerConfig(policy=policy)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_a_step_extends_those_who_run_and_admits_while_there_are_places(policy: str) -> None:
    desk, scheduler = desk_for(policy, max_num_seqs=3)
    for number in range(4):
        desk.ask(str(number), [10 * number, 1])
    assert len(desk.step(scheduler).admitted) == 3
    assert desk.step(scheduler).num_new_tokens == [1, 1, 1]
    desk.end(desk.requests["1"])
    output = desk.step(scheduler)
    assert output.num_new_tokens == [1, 1, 2]
    assert desk.running == ["0", "2", "3"]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_who_runs_goes_before_who_waits_when_tokens_are_short(policy: str) -> None:
    desk, scheduler = desk_for(policy, max_num_batched_tokens=3)
    for number in range(4):
        desk.ask(str(number), [10 * number, 1])
    assert desk.step(scheduler).tokens_by_request() == {"0": 2, "1": 1}
    assert desk.step(scheduler).tokens_by_request() == {"0": 1, "1": 1, "2": 1}
    assert desk.step(scheduler).tokens_by_request() == {"0": 1, "1": 1, "2": 1}


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_nobody_is_admitted_in_a_step_in_which_somebody_had_to_yield(policy: str) -> None:
    desk, scheduler = desk_for(policy, num_blocks=5, cached=False, max_num_seqs=3)
    for number in range(2):
        desk.ask(str(number), range(10 * number, 10 * number + 8))
    desk.step(scheduler)
    waiting = desk.ask("small", [1])
    output = desk.step(scheduler)
    assert preempted(output) == ["1"]
    assert output.tokens_by_request() == {"0": 1}
    assert output.admitted == []
    assert desk.waiting == {"1", "small"}
    assert waiting.metrics.num_preemptions == 0


def test_the_youngest_yields_until_there_is_room_perhaps_the_one_that_asks() -> None:
    desk, scheduler = desk_for("fcfs", num_blocks=7, cached=False)
    for number in range(3):
        desk.ask(str(number), range(10 * number, 10 * number + 8))
    desk.step(scheduler)
    output = desk.step(scheduler)
    assert preempted(output) == ["2"]
    assert output.tokens_by_request() == {"0": 1, "1": 1}
    desk, scheduler = desk_for("fcfs", num_blocks=5, cached=False)
    for number in range(2):
        desk.ask(str(number), range(10 * number, 10 * number + 8 - number))
    desk.step(scheduler)
    assert preempted(desk.step(scheduler)) == ["1"]


def test_fcfs_lets_nobody_overtake() -> None:
    desk, scheduler = desk_for("fcfs", num_blocks=5)
    desk.ask("a", range(4))
    desk.ask("too long for now", range(20, 36))
    desk.ask("short", [1])
    desk.step(scheduler)
    assert desk.running == ["a"]
    desk.step(scheduler)
    assert desk.running == ["a"]
    assert desk.requests["a"].metrics.num_preemptions == 0


# --- priority: who is more urgent takes the place of who is less ----------------------------------------------------


def test_a_newcomer_takes_the_place_of_the_least_urgent() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=3)
    for name, priority in {"low": 3, "high": 1, "mid": 2}.items():
        desk.ask(name, [priority, 5], priority=priority)
    desk.step(scheduler)
    assert desk.running == ["high", "mid", "low"]
    desk.ask("urgent", [7], priority=0)
    output = desk.step(scheduler)
    assert preempted(output) == ["low"]
    assert desk.running == ["urgent", "high", "mid"]
    assert output.tokens_by_request() == {"urgent": 1, "high": 1, "mid": 1}


def test_a_newcomer_takes_no_more_than_it_needs() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=3)
    for number in range(3):
        desk.ask(str(number), [number, 5], priority=1)
    desk.step(scheduler)
    desk.ask("urgent", [7], priority=0, width=2)
    output = desk.step(scheduler)
    assert preempted(output) == ["2", "1"], "the last in order first"
    assert desk.running == ["urgent", "0"]


@pytest.mark.parametrize("priority", [1, 2])
def test_nobody_yields_to_a_newcomer_that_is_not_more_urgent(priority: int) -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=2)
    for number in range(2):
        desk.ask(str(number), [number, 5], priority=1)
    desk.step(scheduler)
    desk.ask("newcomer", [7], priority=priority, arrival=-1)
    assert preempted(desk.step(scheduler)) == []
    assert desk.running == ["0", "1"]
    assert desk.waiting == {"newcomer"}


def test_only_those_who_are_less_urgent_yield_even_if_that_is_not_enough() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=3)
    for name, priority in {"equal": 1, "low": 2, "lower": 3}.items():
        desk.ask(name, [priority, 5], priority=priority)
    desk.step(scheduler)
    desk.ask("wide", [7], priority=1, width=3)
    assert preempted(desk.step(scheduler)) == [], "with two places it would find no room"
    assert desk.running == ["equal", "low", "lower"]
    desk.ask("narrower", [8], priority=0, width=2, arrival=9)
    assert preempted(desk.step(scheduler)) == ["lower", "low"]
    assert desk.running == ["narrower", "equal"]


def test_nobody_yields_for_a_newcomer_that_memory_would_still_be_short_for() -> None:
    desk, scheduler = desk_for("priority", num_blocks=9, max_num_seqs=4, cached=False)
    desk.ask("first", range(16), priority=0)
    desk.ask("low", range(20, 27), priority=2)
    desk.step(scheduler)
    desk.ask("long", range(40, 60), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == [], "five blocks, and no more than three can be had"
    assert output.tokens_by_request() == {"first": 1, "low": 1}


def test_nobody_yields_if_what_an_admission_must_leave_would_be_missing() -> None:
    desk, scheduler = desk_for("priority", num_blocks=17, cached=False)
    desk.ask("high", range(4), priority=0)
    desk.ask("low", range(20, 52), priority=2)
    desk.step(scheduler)
    desk.ask("mid", range(100, 156), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == [], "fourteen blocks could be had, and one must be left for the other"
    assert output.tokens_by_request() == {"high": 1, "low": 1}


def test_nobody_yields_blocks_that_somebody_else_holds_too() -> None:
    desk, scheduler = desk_for("priority", num_blocks=9)
    desk.ask("high", range(17), priority=0)
    desk.step(scheduler)
    desk.ask("low", range(17), priority=2)
    desk.step(scheduler)
    desk.ask("mid", range(20, 40), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == [], "of its five blocks four are shared, and mid needs five"
    assert output.tokens_by_request() == {"high": 1, "low": 1}


def test_a_newcomer_that_finds_its_beginning_takes_room_for_the_rest_from_those_it_outranks() -> None:
    desk, scheduler = desk_for("priority", num_blocks=8, max_chunk_tokens=16)
    gone = desk.ask("gone", range(16))
    desk.admit(gone)
    desk.end(gone)
    desk.ask("high", range(40, 47), priority=0)
    desk.ask("low", [50], priority=2)
    desk.step(scheduler)
    desk.budget = Desk(max_chunk_tokens=4).budget
    desk.ask("mid", range(30), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == ["low"], "four blocks are found, and its block holds the first chunk"
    assert output.tokens_by_request() == {"high": 1, "mid": 4}


def test_without_chunks_nobody_yields_for_a_prompt_that_this_step_has_no_tokens_for() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=2, max_num_batched_tokens=8, chunked_prefill=False)
    desk.ask("high", [1], priority=0)
    desk.ask("low", [2], priority=2)
    desk.step(scheduler)
    desk.ask("mid", range(20, 28), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == [], "eight tokens wanted, and one is gone"
    assert output.tokens_by_request() == {"high": 1, "low": 1}


def test_nobody_yields_to_one_on_the_host_that_would_find_no_room() -> None:
    desk, scheduler = desk_for("priority", num_blocks=8, cached=False, num_host_blocks=4, mode="swap")
    mid = desk.ask("mid", range(15), priority=1)
    desk.step(scheduler)
    desk.plan().preempt(mid)
    high, low = desk.ask("high", range(20, 31), priority=0), desk.ask("low", [1], priority=2)
    desk.admit(high, low)
    output = desk.step(scheduler)
    assert preempted(output) == [], "it needs four blocks and one for its next token, and four can be had"
    assert output.tokens_by_request() == {"high": 1, "low": 1}
    desk.end(high)
    assert desk.step(scheduler).resumed == [mid]


def test_who_outranks_the_newcomer_does_not_yield_though_it_sits_the_step_out() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=2)
    desk.ask("high", [1], priority=0)
    desk.step(scheduler)
    desk.state.running[0].live[0].num_computed_tokens += 1  # its newest token is on its way
    desk.ask("low", [2], priority=2)
    desk.step(scheduler)
    desk.ask("mid", [3], priority=1, width=2)
    assert preempted(desk.step(scheduler)) == []
    assert desk.running == ["high", "low"]


def test_a_newcomer_runs_one_chunk_in_the_step_that_admits_it() -> None:
    desk, scheduler = desk_for("priority", max_chunk_tokens=4, max_num_seqs=4)
    for name, priority in {"high": 0, "low": 2, "lower": 3}.items():
        desk.ask(name, [priority], priority=priority)
    desk.step(scheduler)
    desk.ask("mid", range(20, 32), priority=1)
    desk.ask("top", range(40, 52), priority=-1)
    output = desk.step(scheduler)
    assert preempted(output) == ["lower"]
    assert [request.request_id for request in output.scheduled] == ["top", "high", "mid", "low"]
    assert output.tokens_of_scheduled == [4, 1, 4, 1]


def test_a_newcomer_gets_memory_from_those_it_outranks() -> None:
    desk, scheduler = desk_for("priority", num_blocks=7, max_num_seqs=4, cached=False)
    desk.ask("low", range(10), priority=2)
    desk.ask("lower", range(20, 30), priority=3)
    desk.step(scheduler)
    desk.ask("urgent", range(40, 50), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == ["lower"]
    assert desk.running == ["urgent", "low"]


def test_a_newcomer_for_whom_there_is_room_costs_nobody_anything_and_runs_first() -> None:
    desk, scheduler = desk_for("priority", max_num_batched_tokens=6)
    desk.ask("low", range(3), priority=2)
    desk.step(scheduler)
    desk.ask("urgent", range(20, 26), priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == []
    assert output.tokens_by_request() == {"urgent": 6}, "and here the other one waits for tokens"
    assert desk.step(scheduler).tokens_by_request() == {"urgent": 1, "low": 1}


def test_several_newcomers_stand_before_those_they_outrank() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=4)
    for number in range(4):
        desk.ask(f"low{number}", [number, 5], priority=5)
    desk.step(scheduler)
    for number in range(3):
        desk.ask(f"urgent{number}", [20 + number], priority=number)
    output = desk.step(scheduler)
    assert preempted(output) == ["low3", "low2", "low1"]
    assert desk.running == ["urgent0", "urgent1", "urgent2", "low0"]
    assert sorted(output.tokens_by_request()) == ["low0", "urgent0", "urgent1", "urgent2"]


def test_a_newcomer_between_two_takes_from_the_lower_one_what_the_step_has_not_scheduled() -> None:
    desk, scheduler = desk_for("priority", max_num_seqs=2)
    desk.ask("high", [1, 5], priority=0)
    desk.ask("low", [2, 5], priority=2)
    desk.step(scheduler)
    desk.ask("mid", [7], priority=1)
    output = desk.step(scheduler)
    assert preempted(output) == ["low"]
    assert output.tokens_by_request() == {"high": 1, "mid": 1}


def test_no_step_preempts_more_often_than_there_are_requests() -> None:
    desk, scheduler = desk_for("priority", num_blocks=13, max_num_seqs=4, num_host_blocks=6, mode="swap")
    generator = random.Random(0)
    most = 0
    for number in range(300):
        if len(desk.requests) < 400 and generator.random() < 0.5:
            start = generator.randrange(50)
            desk.ask(str(number), range(start, start + generator.randint(1, 12)), priority=generator.randrange(4))
        if desk.state.is_idle:
            continue
        running = set(desk.running)
        output = desk.step(scheduler)
        assert output.num_tokens, "every step moves somebody on"
        assert len(set(preempted(output))) == len(output.preempted), "nobody yields twice in a step"
        assert set(preempted(output)) <= running
        most = max(most, len(output.preempted))
        for request in [r for r in desk.state.running if len(r.live[0].data.output_token_ids) >= 6]:
            desk.end(request)
    assert most >= 2, "some newcomer cost more than one"
    assert any(request.metrics.num_swaps for request in desk.requests.values())


# --- fairness between tenants: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 -----------------


def serve(desk: Desk, scheduler: Any, length: int = 3) -> Any:
    """Run a step, tell the policy what came of it, and end who has enough."""
    output = desk.step(scheduler)
    sampled = {seq_id for seq_id, samples in zip(output.seq_ids, output.samples, strict=True) if samples}
    for request in list(desk.state.running):
        count = sum(sequence.seq_id in sampled for sequence in request.live)
        if count:
            scheduler.on_tokens(request, count)
        if len(request.live[0].data.output_token_ids) >= length:
            desk.end(request)
    return output


def test_a_prompt_token_counts_one_and_a_generated_one_two() -> None:
    desk, scheduler = desk_for("fair")
    request = desk.ask("a", range(5), tenant="t")
    desk.step(scheduler)
    assert scheduler.counters == {"t": 5.0}
    scheduler.on_tokens(request, 3)
    assert scheduler.counters == {"t": 11.0}
    desk.step(scheduler)
    assert scheduler.counters == {"t": 11.0}, "a prompt is charged when it is admitted, and then no more"


def test_a_request_that_comes_back_is_not_charged_for_its_prompt_again() -> None:
    desk, scheduler = desk_for("fair")
    request = desk.ask("a", range(5), tenant="t")
    desk.step(scheduler)
    desk.plan().preempt(request)
    assert desk.step(scheduler).admitted == [request]
    assert scheduler.counters == {"t": 5.0}


def test_the_tenant_served_least_is_next_and_its_oldest_request_first() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=1)
    for name in ("a1", "a2", "a3", "b1", "b2"):
        desk.ask(name, [1, 2], tenant=name[0])
    order = []
    while not desk.state.is_idle:
        order += [request.request_id for request in serve(desk, scheduler).admitted]
    assert order == ["a1", "b1", "a2", "b2", "a3"]


def test_the_tenant_served_least_is_extended_first_and_the_one_served_most_yields() -> None:
    desk, scheduler = desk_for("fair", num_blocks=7, cached=False)
    for number, tenant in enumerate("abc"):
        desk.ask(tenant, range(10 * number, 10 * number + 8), tenant=tenant)
    desk.step(scheduler)
    scheduler.counters |= {"a": 30.0, "b": 10.0, "c": 20.0}
    output = desk.step(scheduler)
    assert preempted(output) == ["a"]
    assert [request.request_id for request in output.scheduled] == ["b", "c"]


def test_of_one_tenants_requests_the_youngest_yields() -> None:
    desk, scheduler = desk_for("fair", num_blocks=5, cached=False)
    for number in range(2):
        desk.ask(str(number), range(10 * number, 10 * number + 8), tenant="t")
    desk.step(scheduler)
    assert preempted(desk.step(scheduler)) == ["1"]


def test_a_tenant_that_was_away_comes_back_without_a_claim_on_what_it_did_not_use() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=2)
    desk.ask("a1", [1, 2], tenant="a", arrival=0)
    desk.ask("b1", [3, 4], tenant="b", arrival=1)
    desk.step(scheduler)
    desk.end(desk.requests["b1"])
    scheduler.counters["a"] = 100.0
    desk.step(scheduler)
    desk.ask("b2", [5], tenant="b")
    desk.step(scheduler)
    assert scheduler.counters == {"a": 100.0, "b": 101.0}, "lifted to the least of those who stayed, and charged"


def test_a_tenant_that_is_ahead_keeps_its_counter_when_it_comes_back() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=2)
    desk.ask("a1", [1, 2], tenant="a", arrival=0)
    desk.ask("b1", [3, 4], tenant="b", arrival=1)
    desk.step(scheduler)
    scheduler.counters |= {"a": 10.0, "b": 50.0}
    desk.end(desk.requests["b1"])
    desk.step(scheduler)
    desk.ask("b2", [5], tenant="b")
    desk.step(scheduler)
    assert scheduler.counters == {"a": 10.0, "b": 51.0}


def test_a_newcomer_starts_at_the_least_served_of_those_who_are_here() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=3)
    for number, tenant in enumerate("ab"):
        desk.ask(tenant, [10 * number], tenant=tenant)
    desk.step(scheduler)
    scheduler.counters |= {"a": 40.0, "b": 30.0}
    desk.ask("c", [5, 6], tenant="c")
    desk.step(scheduler)
    assert scheduler.counters == {"a": 40.0, "b": 30.0, "c": 32.0}


def test_to_an_empty_engine_everybody_comes_back_at_the_last_one_to_leave() -> None:
    desk, scheduler = desk_for("fair")
    for number, tenant in enumerate("ab"):
        desk.ask(tenant, [10 * number], tenant=tenant)
    desk.step(scheduler)
    scheduler.counters |= {"a": 40.0, "b": 30.0}
    for tenant in "ab":
        desk.end(desk.requests[tenant])
    desk.step(scheduler)
    desk.ask("c1", [5], tenant="c")
    desk.ask("b2", [6], tenant="b")
    desk.step(scheduler)
    assert {tenant: scheduler.counters[tenant] for tenant in "bc"} == {"b": 41.0, "c": 41.0}


def test_those_who_stay_keep_their_counters_when_others_come_and_go() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=4)
    for number, tenant in enumerate("abc"):
        desk.ask(tenant, [10 * number], tenant=tenant)
    desk.step(scheduler)
    scheduler.counters |= {"a": 10.0, "b": 20.0, "c": 5.0}
    desk.end(desk.requests["c"])
    desk.step(scheduler)
    assert scheduler.counters == {"a": 10.0, "b": 20.0}, "who left below all others is not remembered"
    desk.end(desk.requests["b"])
    desk.step(scheduler)
    assert scheduler.counters == {"a": 10.0, "b": 20.0}, "and who left above them is"


def test_a_tenant_that_leaves_with_no_more_than_the_others_is_forgotten() -> None:
    desk, scheduler = desk_for("fair")
    for number, tenant in enumerate("ab"):
        desk.ask(tenant, [10 * number], tenant=tenant)
    desk.step(scheduler)
    desk.end(desk.requests["a"])
    desk.step(scheduler)
    assert scheduler.counters == {"b": 1.0}


def test_tokens_that_come_when_their_tenant_is_forgotten_are_charged_all_the_same() -> None:
    desk, scheduler = desk_for("fair")
    request = desk.ask("a", [1], tenant="a")
    scheduler.on_tokens(request, 2)
    assert scheduler.counters == {"a": 4.0}


def test_waiting_tenants_are_here_too() -> None:
    desk, scheduler = desk_for("fair", max_num_seqs=1)
    desk.ask("a", [1], tenant="a")
    desk.ask("b", [2], tenant="b")
    desk.step(scheduler)
    scheduler.counters["a"] = 50.0
    desk.ask("c", [3], tenant="c")
    desk.step(scheduler)
    assert scheduler.counters == {"a": 50.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_service_of_two_backlogged_tenants_differs_by_a_bound_that_does_not_grow(seed: int) -> None:
    """Theorem 4.4: at most twice the larger of the longest prompt's weight and that of all tokens that fit memory."""
    desk, scheduler = desk_for("fair", num_blocks=17, max_num_seqs=4, cached=False)
    generator = random.Random(seed)
    longest, length, most_running_tokens = 12, 8, 16 * SIZE
    bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * most_running_tokens)
    longest_of, backlogs = {"many": longest, "few": 3}, {"many": 20, "few": 4}
    apart = 0.0
    for _ in range(600):
        for tenant, backlog in backlogs.items():
            while sum(request.tenant == tenant for request in desk.state.waiting) < backlog:
                prompt = [generator.randrange(99) for _ in range(generator.randint(1, longest_of[tenant]))]
                desk.ask(f"{tenant}{len(desk.requests)}", prompt, tenant=tenant)
        serve(desk, scheduler, length)
        apart = max(apart, abs(scheduler.counters["many"] - scheduler.counters["few"]))
    assert min(scheduler.counters.values()) > 10 * bound, "both were served much more than the bound"
    assert 0 < apart <= bound
