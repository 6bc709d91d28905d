"""Sequences and requests: the state machine, serialisation, and forks that never reach each other."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from folo_core.errors import IllegalTransitionError
from folo_core.request import Request, RequestMetrics
from folo_core.sampling_params import SamplingParams
from folo_core.sequence import (
    FINISHED,
    TRANSITIONS,
    Sequence,
    SequenceData,
    SequenceStatus,
    create_sequences,
)

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=8)


def make_sequence(prompt: tuple[int, ...] = (1, 2), **fields: object) -> Sequence:
    return Sequence(seq_id=0, index=0, data=SequenceData(prompt), **fields)


@pytest.mark.parametrize(("old", "new"), itertools.product(SequenceStatus, SequenceStatus))
def test_exactly_the_listed_moves_are_possible(old: SequenceStatus, new: SequenceStatus) -> None:
    sequence = make_sequence(status=old)
    if new in TRANSITIONS[old]:
        sequence.transition(new)
        assert sequence.status is new
    else:
        with pytest.raises(IllegalTransitionError, match=f"{old.name} -> {new.name}"):
            sequence.transition(new)
        assert sequence.status is old


def test_every_finished_status_is_final_and_names_its_reason() -> None:
    reasons = {status.finish_reason for status in FINISHED}
    assert reasons == {"stop", "length", "abort", "error"}
    assert all(not TRANSITIONS[status] for status in FINISHED)
    assert all(status.finish_reason is None for status in SequenceStatus if status not in FINISHED)


def test_every_unfinished_status_leads_to_an_end() -> None:
    reachable = {SequenceStatus.WAITING}
    while grown := {new for old in reachable for new in TRANSITIONS[old]} - reachable:
        reachable |= grown
    assert reachable == set(SequenceStatus)


@given(prompt=TOKENS, output=TOKENS, logprob=st.none() | st.floats(-50, 0))
def test_sequence_data_survives_json(prompt: list[int], output: list[int], logprob: float | None) -> None:
    data = SequenceData(prompt, output, logprob)
    assert SequenceData.from_dict(json.loads(json.dumps(data.to_dict()))) == data


@given(prompt=TOKENS, steps=st.lists(st.tuples(st.booleans(), st.integers(0, 99))))
def test_cached_token_ids_are_always_prompt_plus_output(prompt: list[int], steps: list[tuple[bool, int]]) -> None:
    data = SequenceData(prompt)
    for look, token in steps:
        if look:
            assert data.token_ids == [*data.prompt_token_ids, *data.output_token_ids]
        data.append(token)
    assert data.token_ids == [*prompt, *(token for _, token in steps)]
    assert data.num_tokens == len(data.token_ids)


def test_the_last_token_is_the_prompts_until_there_is_an_output() -> None:
    data = SequenceData((4, 5))
    assert data.last_token_id == 5
    data.append(6, -0.5)
    data.append(7, -0.25)
    assert data.last_token_id == 7
    assert data.cumulative_logprob == -0.75


def test_many_sequences_are_created_with_consecutive_ids() -> None:
    sequences = create_sequences([(1,), (2, 3)], first_id=5)
    assert [s.seq_id for s in sequences] == [5, 6]
    assert [s.data.prompt_token_ids for s in sequences] == [(1,), (2, 3)]


class Forks(RuleBasedStateMachine):
    """Nested forks, written in any order: every sequence holds exactly what was written to it and its past."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = (3, 1, 4)
        self.sequences = [make_sequence(self.prompt, logprobs=[])]
        self.outputs: list[list[int]] = [[]]
        self.sums: list[float] = [0.0]

    @rule(pick=st.integers(0, 10**6), token=st.integers(0, 99))
    def append(self, pick: int, token: int) -> None:
        place = pick % len(self.sequences)
        self.sequences[place].add_token_id(token, -1.0)
        self.sequences[place].logprobs.append({token: None})
        self.outputs[place] = [*self.outputs[place], token]
        self.sums[place] -= 1.0

    @rule(pick=st.integers(0, 10**6))
    def look(self, pick: int) -> None:
        place = pick % len(self.sequences)
        assert self.sequences[place].data.token_ids == [*self.prompt, *self.outputs[place]]

    @rule(pick=st.integers(0, 10**6))
    def fork(self, pick: int) -> None:
        place, new = pick % len(self.sequences), len(self.sequences)
        self.sequences.append(self.sequences[place].fork(seq_id=new, index=new))
        self.outputs.append(self.outputs[place])
        self.sums.append(self.sums[place])

    @rule(pick=st.integers(0, 10**6))
    def overwrite(self, pick: int) -> None:
        """Even a direct edit of one fork's output list stays its own."""
        place = pick % len(self.sequences)
        self.sequences[place].data.output_token_ids.clear()
        self.sequences[place].data._token_ids = None
        self.outputs[place] = []

    @invariant()
    def nobody_sees_anothers_writes(self) -> None:
        for sequence, output, total in zip(self.sequences, self.outputs, self.sums, strict=True):
            assert sequence.data.output_token_ids == output
            assert (sequence.data.cumulative_logprob or 0.0) == total
            assert sequence.data.prompt_token_ids is self.sequences[0].data.prompt_token_ids


TestForks = Forks.TestCase
TestForks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_fork_starts_in_its_parents_place() -> None:
    parent = make_sequence(num_computed_tokens=2, num_cached_tokens=1, status=SequenceStatus.RUNNING)
    child = parent.fork(seq_id=7, index=3)
    assert (child.seq_id, child.index) == (7, 3)
    assert (child.num_computed_tokens, child.num_cached_tokens, child.status) == (2, 1, SequenceStatus.RUNNING)
    child.transition(SequenceStatus.FINISHED_ABORTED)
    assert parent.status is SequenceStatus.RUNNING


def make_request(**fields: object) -> Request:
    return Request(request_id="r", prompt_token_ids=(1, 2), params=SamplingParams(**fields), seed=0)


def test_a_request_owns_its_sequences_and_is_finished_when_all_are() -> None:
    request = make_request(logprobs=1)
    root = request.open_sequence(0)
    child = request.fork_sequence(root, 1)
    request.live.append(child)
    assert (root.index, child.index) == (0, 1)
    assert root.data.cumulative_logprob == 0.0
    for sequence in (root, child):
        sequence.transition(SequenceStatus.RUNNING)
    request.close_sequence(child, SequenceStatus.FINISHED_STOPPED)
    assert not request.is_finished
    assert request.get_seqs(SequenceStatus.RUNNING) == [root]
    request.close_sequence(root, SequenceStatus.FINISHED_LENGTH_CAPPED)
    assert request.is_finished
    assert request.get_seqs() == [child, root]


def test_a_request_is_frozen() -> None:
    with pytest.raises(AttributeError):
        make_request().priority = 3


def test_metrics_tell_queue_time_first_token_and_the_gaps_between_tokens() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert (metrics.queue_time, metrics.time_to_first_token, metrics.inter_token_latency) == (None, None, None)
    metrics.first_scheduled_time = 11.0
    metrics.record_tokens(12.0, 1)
    assert metrics.inter_token_latency is None
    metrics.record_tokens(13.0, 1)
    metrics.record_tokens(15.0, 1)
    assert (metrics.queue_time, metrics.time_to_first_token, metrics.inter_token_latency) == (1.0, 2.0, 1.5)
