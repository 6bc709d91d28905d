"""What observers are told of requests is what the engine's books say."""

from __future__ import annotations

from collections import Counter

from engines import ObserverPlugin, greedy, make_engine, run
from folo_core.engine.observer import RequestEvent


class Events(ObserverPlugin):
    """Records every event of requests beside every step."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_request(self, record):
        self.events.append(record)


def run_under_pressure():
    watch = Events()
    options = {"num_blocks": 24, "swap_space": "256B", "preemption": "swap", "max_num_seqs": 8}
    engine, _ = make_engine(plugins=[watch], **options)
    for i in range(12):
        engine.add_request(f"r{i}", "abcdefgh" + "ij" * i, greedy(max_tokens=16, ignore_eos=True))
    run(engine)
    return engine, watch


def test_events_of_requests_are_counted_like_the_stats():
    engine, watch = run_under_pressure()
    stats, counts = engine.stats(), Counter(record.event for record in watch.events)
    assert counts[RequestEvent.SWAPPED_OUT] == counts[RequestEvent.SWAPPED_IN] == stats.num_swaps > 0
    assert counts[RequestEvent.PREEMPTED] == stats.num_preemptions - stats.num_swaps > 0
    assert counts[RequestEvent.QUEUED] == counts[RequestEvent.FINISHED] == 12
    assert counts[RequestEvent.STARTED] == 12 + counts[RequestEvent.PREEMPTED]
    assert sum(record.num_preempted for record in watch.records) == stats.num_preemptions


def test_a_swapped_request_takes_up_the_blocks_that_were_moved():
    _, watch = run_under_pressure()
    moved = sum(r.num_blocks for r in watch.events if r.event is RequestEvent.SWAPPED_OUT)
    assert moved == sum(record.swapped_out_blocks for record in watch.records) > 0
    assert all(r.num_blocks == 0 for r in watch.events if r.event in {RequestEvent.PREEMPTED, RequestEvent.FINISHED})


def test_a_step_tells_whom_its_tokens_belong_to():
    engine, watch = run_under_pressure()
    for record in watch.records:
        assert sum(record.tokens_of.values()) == record.num_tokens
        assert sum(record.sampled_of.values()) == record.num_sampled
        assert set(record.sampled_of) <= set(record.tokens_of)
        assert record.block_bytes == engine.stats().kv.block_bytes == 32
    totals = Counter()
    for record in watch.records:
        totals.update(record.sampled_of)
    assert set(totals.values()) == {16}
