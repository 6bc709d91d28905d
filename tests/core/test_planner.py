"""Queue, state and planner: what a step holds, who is admitted to it, and what it keeps whatever is asked."""

from __future__ import annotations

import pytest

from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.costs import PreemptionCosts
from folo_core.scheduling.interface import Fork, SchedulerOutput, SchedulerState
from folo_core.scheduling.planner import SPARE_SHARE
from folo_core.scheduling.queue import RequestQueue
from folo_core.sequence import SequenceStatus
from planning import Desk, by_arrival

# --- the queue ------------------------------------------------------------------------------------------------------


def names(requests):
    return [request.request_id for request in requests]


def test_a_queue_gives_the_first_in_its_policys_order():
    desk = Desk(order=lambda request: (request.priority, request.arrival))
    queue = desk.state.waiting
    for name, priority in {"late": 2, "mid": 1, "urgent": 0, "mid too": 1}.items():
        desk.ask(name, [1], priority=priority)
    assert names(queue) == ["late", "mid", "urgent", "mid too"], "iteration is by arrival"
    taken = []
    while queue:
        taken.append(queue.remove(queue.peek().request_id).request_id)
    assert taken == ["urgent", "mid", "mid too", "late"]
    assert len(queue) == 0


def test_an_empty_queue_has_no_first():
    queue = RequestQueue(by_arrival)
    assert not queue
    assert queue.firsts() == []
    with pytest.raises(IndexError, match=r"^the queue is empty$"):
        queue.peek()


def test_requests_that_the_policy_holds_for_equal_come_by_arrival():
    desk = Desk(order=lambda request: ())
    second = desk.ask("second", [1], arrival=2)
    first = desk.ask("first", [1], arrival=1)
    other = desk.ask("other", [1], arrival=0, tenant="t")
    assert desk.state.waiting.firsts() == [other, first]
    desk.state.waiting.remove("first")
    assert desk.state.waiting.firsts() == [other, second]


def test_a_request_can_leave_from_anywhere_and_is_known_by_its_id():
    desk = Desk()
    requests = [desk.ask(str(number), [1]) for number in range(4)]
    queue = desk.state.waiting
    assert queue.remove("2") is requests[2]
    assert queue.remove("2") is None
    assert queue.remove("0") is requests[0]
    assert ("2" in queue, "3" in queue, len(queue), bool(queue)) == (False, True, 2, True)
    assert queue.peek() is requests[1]


def test_a_request_that_returns_stands_where_its_new_key_says():
    desk = Desk(order=lambda request: (desk.keys[request.request_id],))
    desk.keys = {"a": 0, "b": 1}
    one, two = desk.ask("a", [1]), desk.ask("b", [1])
    queue = desk.state.waiting
    queue.remove("a")
    desk.keys["a"] = 2
    queue.push(one)
    queue.remove("b")
    queue.push(two)
    assert len(queue) == 2
    queue.remove("a")
    assert queue.peek() is two


def test_another_request_under_a_freed_id_is_not_taken_for_the_one_that_left():
    desk = Desk()
    desk.ask("a", [1], arrival=0)
    desk.state.waiting.remove("a")
    again = desk.ask("a", [1], arrival=5)
    other = desk.ask("b", [1], arrival=3)
    assert desk.state.waiting.peek() is other
    desk.state.waiting.remove("b")
    assert desk.state.waiting.peek() is again


def test_each_tenants_first_is_known_and_they_come_in_order():
    desk = Desk()
    for name, tenant in {"a1": "a", "b1": "b", "a2": "a", "c1": "c"}.items():
        desk.ask(name, [1], tenant=tenant)
    queue = desk.state.waiting
    assert names(queue.firsts()) == ["a1", "b1", "c1"]
    queue.remove("a1")
    queue.remove("c1")
    assert names(queue.firsts()) == ["b1", "a2"]
    assert queue.peek().request_id == "b1"
    assert set(queue._heaps) == {"a", "b"}, "a tenant without requests is not remembered"


# --- the state and the step -----------------------------------------------------------------------------------------


def test_a_state_is_idle_when_nobody_waits_or_runs():
    desk = Desk()
    assert desk.state.is_idle
    request = desk.ask("a", [1, 2])
    assert not desk.state.is_idle
    desk.admit(request)
    assert not desk.state.waiting
    assert not desk.state.is_idle
    desk.end(request)
    assert desk.state.is_idle


def test_a_state_without_costs_learns_its_own():
    costs = PreemptionCosts(mode="swap")
    kv = Desk().state.kv
    assert SchedulerState.empty(kv, by_arrival, costs).costs is costs
    assert SchedulerState.empty(kv, by_arrival).costs.mode == "auto"


def test_running_requests_stand_in_order_and_count_with_their_widths():
    desk = Desk()
    late, early = desk.ask("late", [1], arrival=9, width=3), desk.ask("early", [1], arrival=1)
    desk.admit(late, early)
    assert desk.running == ["early", "late"]
    assert desk.state.num_running_seqs == 4


@pytest.mark.parametrize(
    "work",
    [
        {"seq_ids": [1]},
        {"forks": [Fork(0, 1, "a", 1, 2, [3], 2, [1])]},
        {"released": [1]},
        {"zero_blocks": [1]},
        {"swap_out": [(1, 1)]},
        {"swap_in": [(1, 1)]},
    ],
)
def test_a_step_is_empty_if_the_executor_has_nothing_to_do(work):
    assert SchedulerOutput().is_empty
    assert not SchedulerOutput(**work).is_empty


def test_a_step_tells_its_tokens_by_request():
    desk = Desk()
    output = desk.admit(desk.ask("a", range(5)), desk.ask("b", range(10, 13)))
    assert output.tokens_by_request() == {"a": 5, "b": 3}
    assert output.num_tokens == 8


# --- admission ------------------------------------------------------------------------------------------------------


def test_an_admitted_request_runs_its_prompt_and_is_introduced():
    desk = Desk()
    request = desk.ask("a", range(6))
    planner = desk.plan()
    assert planner.admit(request)
    output, sequence = planner.output, request.live[0]
    assert (output.seq_ids, output.num_new_tokens, output.samples) == ([0], [6], [True])
    assert output.scheduled == output.admitted == [request]
    assert (planner.tokens_left, planner.seqs_left) == (58, 7)
    assert output.new_blocks == {0: (0, [1, 2])}
    [new] = output.new_sequences
    assert (new.seq_id, new.request_id, new.index, new.token_ids, new.num_computed) == (
        0,
        "a",
        0,
        [0, 1, 2, 3, 4, 5],
        0,
    )
    assert (sequence.status, sequence.num_computed_tokens) == (SequenceStatus.RUNNING, 6)
    assert (desk.running, desk.waiting) == (["a"], set())
    new.token_ids.append(99)
    output.new_blocks[0][1].append(99)
    assert sequence.data.token_ids == list(range(6)), "what is told is a copy"
    assert sequence.block_table.blocks == [1, 2]


def test_an_introduction_carries_what_the_strategy_knows_of_a_row():
    desk = Desk()
    request = desk.ask("a", [1])
    request.live[0].score, request.live[0].tag = 0.5, 7
    [new] = desk.admit(request).new_sequences
    assert (new.score, new.tag) == (0.5, 7)


def refused(desk, planner, request):
    """Whether the planner refuses a request and changes nothing."""
    kv = desk.state.kv
    books = kv.pool.num_free, kv.pool.num_cached, planner.tokens_left, planner.seqs_left, desk.running, desk.waiting
    was_admitted = planner.admit(request)
    after = kv.pool.num_free, kv.pool.num_cached, planner.tokens_left, planner.seqs_left, desk.running, desk.waiting
    assert was_admitted or books == after
    return not was_admitted


def test_a_request_needs_a_place_for_each_sequence_that_it_may_grow_to():
    desk = Desk(max_num_seqs=4)
    desk.admit(desk.ask("a", [1], width=2))
    planner = desk.plan()
    assert refused(desk, planner, desk.ask("b", [1], width=3))
    assert planner.admit(desk.ask("c", [1], width=2))
    assert refused(desk, planner, desk.ask("d", [1]))


def test_a_request_needs_tokens_and_takes_what_is_left():
    desk = Desk(max_num_batched_tokens=10)
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(6)))
    partly = desk.ask("b", range(10, 16))
    assert planner.admit(partly)
    assert planner.output.num_new_tokens == [6, 4]
    assert planner.output.samples == [True, False]
    assert refused(desk, planner, desk.ask("c", [1]))
    desk.finish(planner.output)
    planner = desk.plan()
    assert planner.extend(partly)
    assert (planner.output.num_new_tokens, planner.output.samples) == ([2], [True])
    assert planner.output.new_blocks == {1: (1, [4])}, "only what is new is told"


def test_a_long_prompt_comes_in_chunks():
    desk = Desk(max_chunk_tokens=5)
    request = desk.ask("a", range(12))
    outputs = [desk.admit(request)]
    for _ in range(2):
        planner = desk.plan()
        assert planner.extend(request)
        desk.finish(planner.output)
        outputs.append(planner.output)
    assert [output.num_new_tokens for output in outputs] == [[5], [5], [2]]
    assert [output.samples for output in outputs] == [[False], [False], [True]]
    assert [output.new_blocks for output in outputs] == [{0: (0, [1, 2])}, {0: (2, [3])}, {}]


def test_without_chunks_a_prompt_that_a_whole_step_could_hold_waits_for_one():
    desk = Desk(max_num_batched_tokens=10, chunked_prefill=False)
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(4)))
    assert refused(desk, planner, desk.ask("b", range(10, 20)))
    assert planner.admit(desk.ask("c", range(20, 26)))
    assert planner.output.num_new_tokens == [4, 6]


def test_without_chunks_a_prompt_as_long_as_a_chunk_runs_whole():
    desk = Desk(max_chunk_tokens=6, chunked_prefill=False)
    assert desk.admit(desk.ask("a", range(6))).num_new_tokens == [6]


def test_without_chunks_a_prompt_that_no_step_could_hold_is_cut_all_the_same():
    desk = Desk(max_num_batched_tokens=10, chunked_prefill=False)
    assert desk.admit(desk.ask("a", range(11))).num_new_tokens == [10]


def test_an_admission_needs_memory_for_what_it_runs_now():
    desk = Desk(num_blocks=4, max_num_batched_tokens=12)
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(4)))
    assert planner.admit(desk.ask("b", range(20, 40))), "eight of its tokens run, in two blocks"
    desk = Desk(num_blocks=4)
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(4)))
    assert refused(desk, planner, desk.ask("b", range(20, 29)))


def test_an_admission_leaves_a_block_for_each_running_sequence_up_to_a_share_of_all():
    desk = Desk(num_blocks=2 * SPARE_SHARE + 1, max_num_batched_tokens=512, max_chunk_tokens=512)
    planner = desk.plan()
    assert planner.admit(desk.ask("a", [1]))
    assert refused(desk, planner, desk.ask("too long", range(4 * 30 + 1)))
    assert planner.admit(desk.ask("b", [2], width=3))
    assert refused(desk, planner, desk.ask("leaves one", range(4 * 29)))
    assert planner.admit(desk.ask("leaves two", range(4 * 28)))


def test_the_first_request_may_take_all_memory():
    desk = Desk(num_blocks=2 * SPARE_SHARE + 1, max_num_batched_tokens=512, max_chunk_tokens=512)
    assert desk.plan().admit(desk.ask("a", range(4 * 2 * SPARE_SHARE)))


# --- beginnings that were computed before ---------------------------------------------------------------------------


def test_a_known_beginning_is_not_computed_again():
    desk = Desk()
    desk.admit(desk.ask("a", range(9)))
    again = desk.ask("b", range(10))
    output = desk.admit(again)
    assert (output.num_new_tokens, output.samples) == ([2], [True])
    [new] = output.new_sequences
    assert (new.num_computed, new.token_ids) == (8, list(range(10)))
    assert output.new_blocks == {1: (0, [1, 2, 4])}
    assert again.live[0].num_computed_tokens == 10
    assert again.live[0].num_cached_tokens == 8


def test_hits_are_counted_once_for_each_admitted_request():
    desk = Desk()
    desk.admit(desk.ask("a", range(9)))
    desk.admit(desk.ask("b", range(9)))
    stats = desk.state.kv.stats
    assert (stats.num_requests, stats.num_queried_tokens, stats.num_hit_tokens) == (2, 18, 8)
    desk.admit(desk.ask("c", range(6)))
    assert (stats.num_requests, stats.num_queried_tokens, stats.num_hit_tokens) == (3, 24, 12)
    assert stats.num_resumed_tokens == 0


def test_a_request_waits_for_a_block_that_this_very_step_computes():
    desk = Desk()
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(9)))
    twin = desk.ask("b", range(9))
    assert refused(desk, planner, twin)
    desk.finish(planner.output)
    assert desk.admit(twin).num_new_tokens == [1]


def test_a_request_does_not_wait_for_a_block_past_what_it_may_find():
    desk = Desk()
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(9)))
    assert planner.admit(desk.ask("b", range(4))), "its only block holds its newest token"
    assert refused(desk, planner, desk.ask("c", range(5)))
    assert planner.admit(desk.ask("d", [0, 1, 2, 99, 4])), "it begins with another block"


def test_a_request_waits_for_the_block_after_those_it_found():
    desk = Desk()
    desk.admit(desk.ask("a", range(5)))
    planner = desk.plan()
    assert planner.admit(desk.ask("b", range(9)))
    assert refused(desk, planner, desk.ask("c", range(9)))
    assert planner.admit(desk.ask("d", [0, 1, 2, 3, 99, 5, 6, 7, 8])), "only the block that it lacks first counts"


def test_only_blocks_that_are_filled_in_this_step_are_waited_for():
    desk = Desk(max_chunk_tokens=6)
    planner = desk.plan()
    first = desk.ask("a", range(13))
    assert planner.admit(first)
    desk.finish(planner.output)
    planner = desk.plan()
    assert planner.extend(first), "tokens 6 to 11 fill the second block and the third"
    assert refused(desk, planner, desk.ask("b", range(9)))
    desk.finish(planner.output)
    planner = desk.plan()
    assert planner.extend(first)
    assert planner.admit(desk.ask("c", range(13))), "all three are here"


def test_a_block_that_a_step_only_fills_in_part_is_not_waited_for():
    desk = Desk(max_chunk_tokens=6)
    first = desk.ask("a", range(13))
    desk.admit(first)
    planner = desk.plan()
    planner.tokens_left = 1
    assert planner.extend(first), "the seventh token, of eight in two blocks"
    planner.tokens_left = 64
    assert planner.admit(desk.ask("b", range(13)))


def test_a_tenant_does_not_wait_for_what_another_computes():
    desk = Desk()
    planner = desk.plan()
    assert planner.admit(desk.ask("a", range(9), prefix_root=b"a"))
    assert planner.admit(desk.ask("b", range(9), prefix_root=b"b"))
    assert planner.output.num_new_tokens == [9, 9]


def test_prompt_log_probabilities_have_the_prompt_computed_and_wait_for_nobody():
    desk = Desk()
    desk.admit(desk.ask("a", range(9)))
    planner = desk.plan()
    assert planner.admit(desk.ask("b", range(20, 29)))
    params = SamplingParams(max_tokens=4, prompt_logprobs=1)
    for name, start in {"known": 0, "underway": 20}.items():
        assert planner.admit(desk.ask(name, range(start, start + 9), params=params))
    assert planner.output.num_new_tokens == [9, 9, 9]


def test_cached_blocks_that_are_found_do_not_count_as_room():
    desk = Desk(num_blocks=5)
    first = desk.ask("a", range(9))
    desk.admit(first)
    desk.end(first)
    assert desk.state.kv.pool.num_cached == 2
    planner = desk.plan()
    assert refused(desk, planner, desk.ask("b", range(17)))
    assert planner.admit(desk.ask("c", range(16)))


# --- running requests -----------------------------------------------------------------------------------------------


def test_a_decoding_request_runs_one_token_and_takes_a_block_when_its_last_is_full():
    desk = Desk()
    request = desk.ask("a", range(3))
    desk.admit(request)
    steps = []
    for _ in range(3):
        planner = desk.plan()
        assert planner.extend(request)
        desk.finish(planner.output)
        steps.append(planner.output)
    assert [step.num_new_tokens for step in steps] == [[1], [1], [1]]
    assert [step.new_blocks for step in steps] == [{}, {0: (1, [2])}, {}]
    assert not any(step.new_sequences for step in steps)


def test_a_request_whose_newest_token_is_still_on_its_way_sits_the_step_out():
    desk = Desk()
    request = desk.ask("a", range(3))
    planner = desk.plan()
    planner.admit(request)
    planner = desk.plan()
    assert planner.extend(request)
    assert planner.output.is_empty
    assert planner.can_preempt(request)


def test_a_running_request_that_memory_is_short_for_is_told_so_and_nothing_changes():
    desk = Desk(num_blocks=3)
    request = desk.ask("a", range(8))
    desk.admit(request)
    planner = desk.plan()
    assert not planner.extend(request)
    assert planner.output.is_empty
    assert request.live[0].num_computed_tokens == 8
    assert planner.tokens_left == 64
    assert planner.can_preempt(request)


def group_of(desk, prompt=range(6), newest=(8,), name="g"):
    """Return a running request whose sequences share a prompt and differ in their newest token."""
    request = desk.ask(name, prompt, width=1 + len(newest))
    desk.admit(request)
    desk.widen(request, *newest)
    return request


def test_a_groups_sequences_run_together_and_a_shared_block_is_copied():
    desk = Desk()
    request = group_of(desk, newest=(7, 8))
    planner = desk.plan()
    assert planner.extend(request)
    output = planner.output
    assert (output.seq_ids, output.num_new_tokens, output.samples) == ([0, 1, 2], [1, 1, 1], [True] * 3)
    assert (output.copy_sources, output.copy_destinations) == ([2, 2], [3, 4])
    assert output.new_blocks == {0: (1, [3]), 1: (1, [4])}, "the last holder keeps the block"
    assert (output.scheduled, output.tokens_of_scheduled) == ([request], [3])
    assert planner.tokens_left == 61


def test_of_a_long_table_only_what_changed_is_told():
    desk = Desk()
    request = group_of(desk, prompt=range(18))
    planner = desk.plan()
    assert planner.extend(request)
    assert planner.output.new_blocks == {0: (4, [6])}
    assert (planner.output.copy_sources, planner.output.copy_destinations) == ([5], [6])


def test_a_group_samples_together_or_not_at_all():
    desk = Desk(max_num_batched_tokens=7)
    request = group_of(desk, newest=(7, 8))
    other = desk.ask("o", range(20, 25))
    planner = desk.plan()
    assert planner.admit(other)
    assert planner.extend(request)
    assert planner.output.seq_ids == [other.live[0].seq_id], "two tokens are left, and three would sample"
    assert planner.can_preempt(request)


def test_those_of_a_group_who_are_ahead_wait_for_the_others():
    desk = Desk(max_num_batched_tokens=8)
    request = group_of(desk, prompt=range(4))
    first, second = request.live
    second.data.output_token_ids += [1, 2, 3]
    second.data._token_ids = None
    planner = desk.plan()
    planner.tokens_left = 4
    assert planner.extend(request)
    assert (planner.output.seq_ids, planner.output.num_new_tokens) == ([second.seq_id], [3])
    assert planner.output.samples == [False]
    assert (first.num_computed_tokens, second.num_computed_tokens) == (4, 7)
    planner = desk.plan()
    assert planner.extend(request)
    assert (planner.output.num_new_tokens, planner.output.samples) == ([1, 1], [True, True])


def test_a_group_decodes_in_chunks_of_a_single_token():
    desk = Desk()
    request = group_of(desk)
    desk.budget = Desk(max_chunk_tokens=1).budget
    planner = desk.plan()
    assert planner.extend(request)
    assert (planner.output.num_new_tokens, planner.output.samples) == ([1, 1], [True, True])


def test_a_group_shares_what_is_left_of_a_steps_tokens():
    desk = Desk()
    request = group_of(desk, newest=(7, 8))
    for sequence in request.live:
        for token in (1, 2):
            sequence.data.append(token)
    planner = desk.plan()
    planner.tokens_left = 5
    assert planner.extend(request)
    assert planner.output.num_new_tokens == [2, 2, 1]
    assert planner.output.samples == [False] * 3


def test_a_group_is_extended_whole_or_not_at_all():
    desk = Desk(num_blocks=3)
    request = group_of(desk, newest=(7, 8))
    planner = desk.plan()
    assert not planner.extend(request)
    assert planner.output.is_empty
    desk.check()


def test_drafts_run_with_the_newest_token():
    desk = Desk()
    request = desk.ask("a", range(3))
    desk.admit(request)
    sequence = request.live[0]
    sequence.draft_token_ids += [5, 6]
    planner = desk.plan()
    assert planner.extend(request)
    assert (planner.output.num_new_tokens, planner.output.samples) == ([3], [True])
    assert sequence.draft_token_ids == [5, 6]
    assert sequence.num_computed_tokens == 6


def test_drafts_that_the_budget_has_no_room_for_are_dropped():
    desk = Desk()
    request = desk.ask("a", range(3))
    desk.admit(request)
    sequence = request.live[0]
    for left, kept in ((2, [5]), (1, [])):
        sequence.draft_token_ids[:] = [5, 6]
        planner = desk.plan()
        planner.tokens_left = left
        assert planner.extend(request)
        assert (planner.output.num_new_tokens, planner.output.samples) == ([left], [True])
        assert sequence.draft_token_ids == kept
        desk.state.kv.truncate(sequence, 3)


def test_drafts_give_way_before_anybody_is_preempted():
    desk = Desk(num_blocks=2)
    request = desk.ask("a", range(3))
    desk.admit(request)
    sequence = request.live[0]
    sequence.draft_token_ids += [5, 6]
    planner = desk.plan()
    assert planner.extend(request)
    assert planner.output.num_new_tokens == [1]
    assert sequence.draft_token_ids == []


def test_a_draft_of_one_sequence_alone_gives_way_too():
    desk = Desk(num_blocks=4)
    request = group_of(desk, prompt=range(7))
    first, second = request.live
    second.draft_token_ids += [5]
    planner = desk.plan()
    assert planner.extend(request), "each has a last block of its own, and the draft would need a fourth"
    assert planner.output.num_new_tokens == [1, 1]
    assert (first.draft_token_ids, second.draft_token_ids) == ([], [])


# --- what could be ----------------------------------------------------------------------------------------------------


def test_whether_a_request_could_be_admitted_in_place_of_others_is_asked_of_places():
    desk = Desk(max_num_seqs=4)
    victims = [desk.ask(str(number), [number], width=2) for number in range(2)]
    desk.admit(*victims)
    planner = desk.plan()
    wide = desk.ask("w", [9], width=3)
    assert not planner.could_admit(wide, [])
    assert not planner.could_admit(wide, victims[:1])
    assert planner.could_admit(wide, victims)


def test_whether_a_request_could_be_admitted_in_place_of_others_is_asked_of_memory():
    desk = Desk(num_blocks=7)
    victims = [desk.ask("x", range(8)), desk.ask("y", range(20, 28))]
    desk.admit(*victims)
    planner = desk.plan()
    assert planner.could_admit(desk.ask("two", range(100, 108)), [])
    assert not planner.could_admit(desk.ask("three", range(100, 109)), [])
    assert planner.could_admit(desk.ask("four", range(100, 116)), victims[:1])
    assert not planner.could_admit(desk.ask("five", range(100, 117)), victims[:1])
    assert planner.could_admit(desk.ask("six", range(100, 124)), victims)
    assert not planner.could_admit(desk.ask("seven", range(100, 125)), victims)
    planner.tokens_left = 8
    assert planner.could_admit(desk.requests["seven"], []), "only a part would run now"


def test_a_beginning_that_is_found_takes_room_unless_others_hold_it_anyway():
    desk = Desk(num_blocks=6)
    gone = desk.ask("gone", range(16))
    desk.admit(gone)
    desk.end(gone)
    low = desk.ask("low", [50])
    desk.admit(low)
    desk.budget = Desk(max_chunk_tokens=4).budget
    newcomer = desk.ask("newcomer", range(30))
    planner = desk.plan()
    assert not planner.could_admit(newcomer, []), "four blocks would come back from the cache, and none is free"
    assert planner.could_admit(newcomer, [low])
    desk = Desk(num_blocks=6)
    low = desk.ask("low", range(16))
    desk.admit(low)
    desk.budget = Desk(max_chunk_tokens=8).budget
    newcomer = desk.ask("newcomer", range(24))
    planner = desk.plan()
    assert not planner.could_admit(newcomer, []), "one is free, and two are needed"
    assert not planner.could_admit(newcomer, [low]), "what is freed is what is found"
    desk.budget = Desk(max_chunk_tokens=4).budget
    assert desk.plan().could_admit(newcomer, [])
    assert desk.plan().could_admit(newcomer, [low])


def test_a_prompt_that_must_be_computed_whole_is_promised_room_for_all_of_it():
    desk = Desk(num_blocks=6)
    desk.admit(desk.ask("a", range(13)))
    params = SamplingParams(max_tokens=4, prompt_logprobs=1)
    planner = desk.plan()
    assert planner.could_admit(desk.ask("plain", range(13)), []), "one block is free, and it lacks but one"
    assert not planner.could_admit(desk.ask("whole", range(13), params=params), [])


def test_one_that_returns_from_the_host_is_promised_room_for_its_next_token_too():
    desk = Desk(num_blocks=6, num_host_blocks=3, mode="swap", cached=False)
    request = desk.ask("a", range(9))
    desk.admit(request)
    desk.plan().preempt(request)
    low = desk.ask("low", range(20, 26))
    planner = desk.plan()
    planner.tokens_left = 0
    assert not planner.could_admit(request, []), "nobody yields for one that could run nothing"
    desk.admit(low)
    planner = desk.plan()
    assert not planner.could_admit(request, []), "three blocks and one more, and three are free"
    assert planner.could_admit(request, [low])


def test_blocks_that_victims_share_are_counted_once():
    desk = Desk(num_blocks=3)
    group = group_of(desk, prompt=range(5))
    planner = desk.plan()
    assert planner.could_admit(desk.ask("two", range(20, 28)), [group])
    assert not planner.could_admit(desk.ask("three", range(20, 29)), [group])


def test_a_victim_without_memory_gives_none():
    desk = Desk(num_blocks=4)
    group = group_of(desk, prompt=range(5))
    desk.state.kv.release(group.live[1])
    assert desk.plan().could_admit(desk.ask("three", range(20, 32)), [group])


def test_nobody_could_be_admitted_without_tokens():
    desk = Desk()
    request = desk.ask("a", [1])
    planner = desk.plan()
    planner.tokens_left = 0
    assert not planner.could_admit(request, [])
    planner.tokens_left = 1
    assert planner.could_admit(request, [])


def test_nobody_yields_for_a_request_that_waits_for_a_block():
    desk = Desk()
    twin, other = desk.ask("b", range(9)), desk.ask("c", range(20, 29))
    planner = desk.plan()
    planner.admit(desk.ask("a", range(9)))
    assert not planner.admit(twin)
    assert not planner.could_admit(twin, [])
    assert planner.could_admit(other, [])
