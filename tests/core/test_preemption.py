"""Who leaves memory, which way, at what cost, and how it comes back."""

from __future__ import annotations

import pytest

from folo_core.errors import SchedulerError
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.costs import PreemptionCosts
from folo_core.sequence import SequenceStatus
from planning import Desk

# --- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_way_that_was_asked_for_is_taken_whatever_it_costs(mode):
    costs = PreemptionCosts(mode=mode, seconds_per_block=1.0)
    costs.observe_step(1, 1.0)
    assert {costs.prefers_swap(tokens, blocks) for tokens, blocks in [(1, 100), (100, 1)]} == {mode == "swap"}


def test_the_cheaper_way_is_taken_and_copying_is_there_and_back():
    costs = PreemptionCosts(seconds_per_block=0.5)
    costs.observe_step(10, 2.5)
    assert costs.seconds_per_token == 0.25
    assert not costs.prefers_swap(num_tokens=12, num_blocks=3), "three seconds either way"
    assert costs.prefers_swap(num_tokens=13, num_blocks=3)
    assert not costs.prefers_swap(num_tokens=12, num_blocks=4)


def test_before_the_first_step_all_is_computed_anew():
    costs = PreemptionCosts()
    assert (costs.mode, costs.seconds_per_token) == ("auto", 0.0)
    assert not costs.prefers_swap(1000, 1)


def test_until_the_first_swap_copying_a_block_counts_a_millisecond():
    costs = PreemptionCosts()
    costs.observe_step(10, 0.01)
    assert costs.prefers_swap(num_tokens=3, num_blocks=1)
    assert not costs.prefers_swap(num_tokens=1, num_blocks=1)


def test_large_and_late_steps_count_for_more():
    costs = PreemptionCosts()
    steps = [(10, 1.0), (1, 5.0), (100, 3.0)]
    for tokens, seconds in steps:
        costs.observe_step(tokens, seconds)
    weights = [0.99 ** (len(steps) - 1 - place) * tokens**2 for place, (tokens, _) in enumerate(steps)]
    mean = sum(w * seconds / tokens for w, (tokens, seconds) in zip(weights, steps, strict=True)) / sum(weights)
    assert costs.seconds_per_token == pytest.approx(mean)


def test_a_swap_moves_the_estimate_a_fifth_of_the_way():
    costs = PreemptionCosts(seconds_per_block=1.0)
    costs.observe_swap(4, 8.0)
    assert costs.seconds_per_block == pytest.approx(1.2)
    costs.observe_swap(0, 8.0)
    assert costs.seconds_per_block == pytest.approx(1.2), "no block, nothing learnt"
    costs.observe_swap(1, 0.2)
    assert costs.seconds_per_block == pytest.approx(1.0)


class Weighed:
    """Costs that note what they are asked."""

    def __init__(self, *, answer=False):
        self.asked = []
        self.answer = answer

    def prefers_swap(self, num_tokens, num_blocks):
        self.asked.append((num_tokens, num_blocks))
        return self.answer


def test_a_group_is_weighed_by_its_distinct_blocks_and_by_what_it_would_compute_anew():
    desk = Desk()
    desk.state.costs = costs = Weighed()
    request = desk.ask("g", range(6), width=3)
    desk.admit(request)
    desk.widen(request, 7, 8)
    planner = desk.plan()
    planner.extend(request)
    desk.finish(planner.output)
    desk.plan().preempt(request)
    assert costs.asked == [(6 + 3, 4)], "the prompt once and a token of each; the full block once and three tails"


def test_a_request_that_is_alone_is_weighed_by_what_it_has_computed():
    desk = Desk(max_chunk_tokens=5)
    desk.state.costs = costs = Weighed()
    request = desk.ask("a", range(9))
    desk.admit(request)
    desk.plan().preempt(request)
    assert costs.asked == [(5, 2)]


def test_two_rows_are_a_group_already():
    desk = Desk()
    desk.state.costs = costs = Weighed()
    desk.plan().preempt(group_of(desk))
    assert costs.asked == [(6 + 2, 3)]


def test_a_member_of_a_group_that_is_not_there_yet_counts_nothing():
    desk = Desk()
    desk.state.costs = costs = Weighed()
    request = desk.ask("g", range(6), width=2)
    desk.admit(request)
    desk.widen(request, 7)
    desk.state.kv.release(request.live[1])
    desk.plan().preempt(request)
    assert costs.asked == [(6, 2)]


# --- leaving --------------------------------------------------------------------------------------------------------


def test_what_a_step_has_scheduled_cannot_be_preempted_in_it():
    desk = Desk()
    one, two = desk.ask("a", range(5)), desk.ask("b", range(10, 15))
    desk.admit(one, two)
    planner = desk.plan()
    assert planner.extend(one)
    assert (planner.can_preempt(one), planner.can_preempt(two)) == (False, True)
    with pytest.raises(SchedulerError, match="request 'a': this step has scheduled it"):
        planner.preempt(one)
    assert (desk.running, one.metrics.num_preemptions, planner.output.preempted) == (["a", "b"], 0, [])


def test_what_a_step_has_admitted_cannot_be_preempted_in_it():
    desk = Desk()
    request = desk.ask("a", range(5))
    planner = desk.plan()
    planner.admit(request)
    with pytest.raises(SchedulerError):
        planner.preempt(request)


def test_a_preempted_request_gives_up_its_memory_and_places_and_queues_again():
    desk = Desk()
    request = desk.ask("a", range(9), width=2)
    desk.admit(request)
    request.live[0].draft_token_ids.append(1)
    planner = desk.plan()
    assert planner.seqs_left == 6
    planner.preempt(request)
    sequence = request.live[0]
    assert (desk.running, desk.waiting) == ([], {"a"})
    assert (planner.output.preempted, planner.output.released) == ([request], [0])
    assert planner.output.swap_out == []
    assert planner.seqs_left == 8
    assert (sequence.status, sequence.num_computed_tokens) == (SequenceStatus.WAITING, 0)
    assert sequence.draft_token_ids == []
    assert sequence.data.output_token_ids == [9], "what was generated stays"
    assert (request.metrics.num_preemptions, request.metrics.num_swaps) == (1, 0)
    assert desk.state.kv.pool.num_available == desk.state.kv.pool.num_usable
    desk.check()


def test_a_preempted_request_moves_to_the_host_if_that_is_the_way():
    desk = Desk(num_host_blocks=3, mode="swap")
    request = desk.ask("a", range(9), width=2)
    desk.admit(request)
    request.live[0].draft_token_ids.append(1)
    planner = desk.plan()
    planner.preempt(request)
    sequence = request.live[0]
    assert (desk.running, desk.waiting) == ([], {"a"})
    assert (planner.output.preempted, planner.output.released) == ([request], [0])
    assert planner.output.swap_out == [(1, 1), (2, 2), (3, 3)]
    assert (sequence.status, sequence.num_computed_tokens) == (SequenceStatus.SWAPPED, 9)
    assert sequence.draft_token_ids == []
    assert request.is_swapped
    assert (request.metrics.num_preemptions, request.metrics.num_swaps) == (1, 1)
    assert desk.state.num_swapped == 1
    assert planner.seqs_left == 8
    desk.check()


def test_a_step_may_preempt_several_and_one_request_may_be_preempted_often():
    desk = Desk(num_host_blocks=6, mode="swap")
    requests = [desk.ask(name, range(start, start + 6)) for name, start in {"a": 0, "b": 20}.items()]
    desk.admit(*requests)
    for times in (1, 2):
        planner = desk.plan()
        for request in requests:
            planner.preempt(request)
        assert (planner.output.released, len(planner.output.swap_out)) == ([0, 1], 4)
        assert [request.metrics.num_preemptions for request in requests] == [times, times]
        assert [request.metrics.num_swaps for request in requests] == [times, times]
        assert desk.state.num_swapped == 2
        output = desk.admit(*requests)
        assert (len(output.swap_in), output.resumed) == (4, requests)
        assert output.new_blocks.keys() == {0, 1}


def preempted(desk, request):
    """Preempt a request and return whether it lies on the host."""
    desk.plan().preempt(request)
    desk.check()
    assert desk.waiting == {request.request_id}
    return request.is_swapped


def test_where_the_host_has_no_room_a_request_is_computed_anew():
    desk = Desk(num_host_blocks=2, mode="swap")
    request = desk.ask("a", range(9))
    desk.admit(request)
    assert not preempted(desk, request)
    assert request.metrics.num_swaps == 0
    assert request.live[0].num_computed_tokens == 0


def test_where_there_is_no_host_memory_a_request_is_computed_anew():
    desk = Desk(mode="swap")
    request = desk.ask("a", range(9))
    desk.admit(request)
    assert not preempted(desk, request)


def test_a_request_moves_only_if_it_has_more_than_its_newest_token_to_move():
    desk = Desk(num_host_blocks=3, mode="swap")
    bare = desk.ask("bare", [1])
    planner = desk.plan()
    assert planner.admit(bare)
    assert not preempted(desk, bare), "its only token will be run again"
    desk = Desk(num_host_blocks=3, mode="swap")
    started = desk.ask("started", [1])
    desk.admit(started)
    assert preempted(desk, started)
    desk = Desk(num_host_blocks=3, mode="swap", max_chunk_tokens=1)
    begun = desk.ask("begun", [1, 2, 3])
    desk.admit(begun)
    assert preempted(desk, begun), "one of three is computed"


def test_a_request_that_still_owes_prompt_log_probabilities_is_computed_anew():
    desk = Desk(num_host_blocks=3, mode="swap")
    request = desk.ask("a", range(9), params=SamplingParams(max_tokens=4, prompt_logprobs=1))
    desk.admit(request)
    assert not preempted(desk, request)
    assert request.metrics.num_preemptions == 1


def test_a_request_on_the_host_can_be_queued_to_be_computed_anew():
    desk = Desk(num_host_blocks=3, mode="swap")
    request = desk.ask("a", range(9))
    desk.admit(request)
    assert preempted(desk, request)
    desk.state.requeue(request)
    assert not request.is_swapped
    assert request.live[0].host_blocks == []
    assert desk.waiting == {"a"}
    assert desk.state.kv.swap.pool.num_free == 3


# --- coming back ----------------------------------------------------------------------------------------------------


def test_a_request_that_lost_its_memory_finds_what_is_still_cached():
    desk = Desk()
    request = desk.ask("a", range(9))
    desk.admit(request)
    desk.plan().preempt(request)
    output = desk.admit(request)
    assert output.num_new_tokens == [2], "the ninth, and the one that was generated"
    assert (output.admitted, output.resumed) == ([request], [])
    stats = desk.state.kv.stats
    assert (stats.num_requests, stats.num_queried_tokens, stats.num_hit_tokens) == (1, 9, 0)
    assert stats.num_resumed_tokens == 8
    assert request.live[0].num_cached_tokens == 0, "not what its prompt was spared"
    desk.plan().preempt(request)
    desk.admit(request)
    assert stats.num_resumed_tokens == 16


def test_a_request_comes_back_from_the_host_where_it_left():
    desk = Desk(num_host_blocks=3, mode="swap")
    request = desk.ask("a", range(9))
    desk.admit(request)
    desk.plan().preempt(request)
    planner = desk.plan()
    assert planner.admit(request)
    output, sequence = planner.output, request.live[0]
    assert [source for source, _ in output.swap_in] == [1, 2, 3]
    assert (output.resumed, output.admitted) == ([request], [])
    assert (output.num_new_tokens, output.samples) == ([1], [True])
    [new] = output.new_sequences
    assert (new.num_computed, new.token_ids) == (9, [*range(9), 9])
    assert output.new_blocks == {0: (0, [target for _, target in output.swap_in])}
    assert (sequence.status, sequence.num_computed_tokens) == (SequenceStatus.RUNNING, 10)
    assert (desk.running, desk.waiting, planner.seqs_left) == (["a"], set(), 7)
    desk.finish(output)
    assert desk.state.kv.stats.num_resumed_tokens == 0


def host_desk(num_blocks, **options):
    """Return a state with a request of nine tokens on the host."""
    desk = Desk(num_blocks, num_host_blocks=8, mode="swap", **options)
    request = desk.ask("a", range(9))
    desk.admit(request)
    desk.plan().preempt(request)
    return desk, request


def test_a_request_comes_back_only_if_its_next_token_has_room_too():
    desk, request = host_desk(6)
    other = desk.ask("o", range(20, 24))
    planner = desk.plan()
    assert planner.admit(other), "one of five blocks"
    assert planner.admit(request), "three, and one for what comes next"
    desk, request = host_desk(5)
    planner = desk.plan()
    assert planner.admit(desk.ask("o", range(20, 24)))
    assert not planner.admit(request)
    assert request.is_swapped
    assert (desk.waiting, planner.output.swap_in, planner.output.resumed) == ({"a"}, [], [])
    desk.check()


def test_a_return_leaves_room_for_all_that_it_will_run():
    desk = Desk(9, num_host_blocks=8, mode="swap", max_chunk_tokens=5)
    request = desk.ask("a", range(21))
    desk.admit(request)
    desk.plan().preempt(request)
    planner = desk.plan()
    planner.tokens_left = 8
    assert planner.admit(desk.ask("o", range(40, 45)))
    desk.check()
    assert planner.tokens_left == 3
    assert planner.admit(request), "two of six blocks, one more and none for three tokens"
    desk = Desk(9, num_host_blocks=8, mode="swap", max_chunk_tokens=5)
    request = desk.ask("a", range(21))
    desk.admit(request)
    desk.plan().preempt(request)
    planner = desk.plan()
    assert planner.admit(desk.ask("o", range(40, 45)))
    assert not planner.admit(request), "two of six blocks, one more and four for sixteen tokens"


def test_a_return_leaves_a_block_for_those_who_run_like_an_admission():
    desk, request = host_desk(33)
    others = [desk.ask(f"o{number}", range(100 * number, 100 * number + 52)) for number in (1, 2)]
    planner = desk.plan()
    planner.tokens_left = 512
    for other in others:
        assert planner.admit(other)
    assert desk.state.kv.pool.num_available == 6
    assert planner.admit(request), "three, one for what comes next, and two for those who run"
    desk, request = host_desk(33)
    planner = desk.plan()
    planner.tokens_left = 512
    others = [desk.ask(f"o{number}", range(100 * number, 100 * number + 52 + number)) for number in (0, 1)]
    for other in others:
        assert planner.admit(other)
    assert desk.state.kv.pool.num_available == 5
    assert not planner.admit(request)


def test_a_request_may_come_back_though_no_token_is_left_to_run():
    desk, request = host_desk(12)
    planner = desk.plan()
    planner.tokens_left = 0
    assert planner.admit(request)
    assert planner.output.seq_ids == []
    [new] = planner.output.new_sequences
    assert new.num_computed == 9
    desk.check()


def group_of(desk, prompt=range(6), newest=(8,)):
    """Return a running request of two rows that share a prompt; each has computed a token of its own."""
    request = desk.ask("g", prompt, width=1 + len(newest))
    desk.admit(request)
    desk.widen(request, *newest)
    planner = desk.plan()
    planner.extend(request)
    desk.finish(planner.output)
    return request


def test_a_group_comes_back_from_the_host_whole():
    desk = Desk(num_host_blocks=8, mode="swap")
    request = group_of(desk)
    planner = desk.plan()
    planner.preempt(request)
    assert planner.output.released == [0, 1]
    assert len(planner.output.swap_out) == 3, "the full block is shared"
    output = desk.admit(request)
    assert output.seq_ids == [0, 1]
    assert [new.num_computed for new in output.new_sequences] == [7, 7]
    assert [new.seq_id for new in output.new_sequences] == [0, 1]
    assert all(sequence.status is SequenceStatus.RUNNING for sequence in request.live)


def test_a_member_that_has_nothing_on_the_host_joins_when_it_can_be_computed():
    desk = Desk(num_host_blocks=8, mode="swap", cached=False)
    request = desk.ask("g", range(6), width=2)
    desk.admit(request)
    desk.widen(request, 8)
    desk.state.kv.release(request.live[1])
    desk.plan().preempt(request)
    assert request.is_swapped
    output = desk.admit(request)
    assert sorted(new.seq_id for new in output.new_sequences) == [0, 1], "each is introduced once"
    assert {new.seq_id: new.num_computed for new in output.new_sequences} == {0: 6, 1: 6}
    assert output.num_new_tokens == [1, 1]


def test_a_preempted_group_computes_what_it_shares_once_and_then_goes_its_ways():
    desk = Desk(cached=False)
    request = group_of(desk, newest=(7, 8))
    desk.plan().preempt(request)
    output = desk.admit(request)
    assert (output.seq_ids, output.num_new_tokens, output.samples) == ([0], [6], [False])
    assert [new.seq_id for new in output.new_sequences] == [0]
    planner = desk.plan()
    assert planner.extend(request)
    output = planner.output
    assert (output.seq_ids, output.num_new_tokens, output.samples) == ([0, 1, 2], [2, 2, 2], [True] * 3)
    assert [(new.seq_id, new.num_computed) for new in output.new_sequences] == [(1, 6), (2, 6)]
    assert len(output.copy_sources) == 2
    desk.finish(output)
    assert [sequence.num_computed_tokens for sequence in request.live] == [8, 8, 8]


def test_what_a_group_shares_is_computed_in_chunks_like_any_prompt():
    desk = Desk(cached=False, max_chunk_tokens=8)
    request = group_of(desk)
    desk.plan().preempt(request)
    desk.budget = Desk(max_chunk_tokens=4).budget
    assert desk.admit(request).num_new_tokens == [4]
    for expected in ([2], [2, 2]):
        planner = desk.plan()
        assert planner.extend(request)
        assert planner.output.num_new_tokens == expected
        desk.finish(planner.output)


def test_a_group_that_memory_is_short_for_goes_on_sharing_nothing_and_is_told_so():
    desk = Desk(num_blocks=5, cached=False)
    request = group_of(desk, prompt=range(7))
    desk.plan().preempt(request)
    desk.admit(request)
    blocker = desk.ask("o", range(50, 58))
    assert desk.plan().admit(blocker)
    planner = desk.plan()
    assert not planner.extend(request), "two rows of nine tokens need three blocks more than there are"
    assert planner.output.is_empty
    assert request.live[1].block_table is None
    assert request.live[1].num_computed_tokens == 0
    desk.check()


def test_a_group_whose_shared_part_finds_no_memory_is_told_so():
    desk = Desk(num_blocks=4, cached=False, max_chunk_tokens=8)
    request = group_of(desk, prompt=range(8))
    desk.plan().preempt(request)
    desk.budget = Desk(max_chunk_tokens=4).budget
    desk.admit(request)
    assert desk.plan().admit(desk.ask("o", range(50, 54)))
    assert desk.plan().admit(desk.ask("p", range(60, 64)))
    planner = desk.plan()
    assert not planner.extend(request)
    planner.tokens_left = 0
    assert planner.extend(request), "without tokens it sits the step out"
    desk.check()


def test_members_of_a_group_find_what_they_had_computed_beyond_what_they_share():
    desk = Desk()
    request = group_of(desk, prompt=range(7))
    for _ in range(5):
        planner = desk.plan()
        planner.extend(request)
        desk.finish(planner.output)
    desk.plan().preempt(request)
    output = desk.admit(request)
    assert output.num_new_tokens == [3], "one block is found, and the rest of the shared seven is computed"
    planner = desk.plan()
    assert planner.extend(request)
    known = {new.seq_id: new.num_computed for new in planner.output.new_sequences}
    assert known == {1: 12}, "its second and third block were still there"
    assert request.live[1].num_indexed_blocks >= 3
    desk.check()


def test_members_of_a_group_share_what_the_first_computed_and_tell_the_cache_of_no_block_twice():
    desk = Desk()
    request = group_of(desk)
    desk.plan().preempt(request)
    assert desk.admit(request).num_new_tokens == [2]
    planner = desk.plan()
    assert planner.extend(request)
    assert [(new.seq_id, new.num_computed) for new in planner.output.new_sequences] == [(1, 6)]
    assert request.live[1].num_indexed_blocks == 1
    desk.finish(planner.output)
    assert [sequence.num_indexed_blocks for sequence in request.live] == [2, 2]
    desk.check()


def test_a_single_token_that_a_group_shares_is_computed_once_too():
    desk = Desk(cached=False, max_chunk_tokens=8)
    request = group_of(desk, prompt=range(5))
    desk.plan().preempt(request)
    desk.budget = Desk(max_chunk_tokens=4).budget
    assert desk.admit(request).num_new_tokens == [4]
    for expected in ([1], [2, 2]):
        planner = desk.plan()
        assert planner.extend(request)
        assert planner.output.num_new_tokens == expected
        desk.finish(planner.output)


def test_rows_that_are_alike_so_far_share_all_but_their_newest_token():
    desk = Desk(cached=False)
    request = desk.ask("g", range(6), width=2)
    desk.admit(request)
    desk.widen(request, 9)
    assert request.live[0].data.token_ids == request.live[1].data.token_ids
    desk.plan().preempt(request)
    output = desk.admit(request)
    assert (output.num_new_tokens, output.samples) == ([6], [False])
    planner = desk.plan()
    assert planner.extend(request)
    assert (planner.output.num_new_tokens, planner.output.samples) == ([1, 1], [True, True])


def test_a_row_that_goes_on_from_another_shares_all_but_the_others_newest_token():
    desk = Desk(cached=False)
    request = desk.ask("g", range(6), width=2)
    desk.admit(request)
    desk.widen(request, 9)
    request.live[1].data.append(5)
    request.live[1].data.append(6)
    desk.plan().preempt(request)
    assert desk.admit(request).num_new_tokens == [6]
    planner = desk.plan()
    assert planner.extend(request)
    assert planner.output.num_new_tokens == [1, 3]
