"""A run's trace is faithful: slices nest, states tile each request's life, and all counts are the engine's."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import DeferredExecutor, SamplerPlugin, TreeParams, TreeSampler, greedy, make_llm
from folo_core.engine.observer import RequestObserver
from folo_core.errors import StepOutOfMemoryError
from folo_core.testing.fakes import FakeModel
from folo_trace import Timeline

PRESSURE = {"num_blocks": 24, "swap_space": "256B", "preemption": "swap", "max_num_seqs": 8}
"""Blocks of 32 bytes: eight of them fit on the host, so that some requests are swapped and others computed anew."""
PROMPTS = ["abcdefgh" + "ij" * i for i in range(12)]
STATES = {"queued", "running", "preempted", "swapped out"}


def traced(
    prompts: Any = PROMPTS, *, params: Any = None, plugins: Any = (), **options: Any
) -> tuple[Any, Timeline, Any]:
    timeline = Timeline()
    llm = make_llm(FakeModel(), plugins=[timeline, *plugins], **(PRESSURE | options))
    params = greedy(max_tokens=16, ignore_eos=True) if params is None else params
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.check_integrity()
    return llm, timeline, outputs


def of(events: list[dict[str, Any]], ph: str, **fields: Any) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == ph and all(e.get(name) == value for name, value in fields.items())]


def span(event: dict[str, Any]) -> tuple[int, int]:
    assert type(event["ts"]) is type(event["dur"]) is int, "viewers cut fractions off"
    return event["ts"], event["ts"] + event["dur"]


def tracks(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in of(events, "X"):
        found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


def pid_of(events: list[dict[str, Any]], name: str) -> int:
    (meta,) = [e for e in of(events, "M", name="process_name") if e["args"]["name"] == name]
    return meta["pid"]


def assert_nested(slices: list[dict[str, Any]]) -> None:
    """Whoever begins inside another ends inside it."""
    stack: list[int] = []
    for event in slices:
        begin, end = span(event)
        assert end >= begin >= 0
        while stack and stack[-1] <= begin:
            stack.pop()
        assert not stack or end <= stack[-1], event
        stack.append(end)


def assert_sound(events: list[dict[str, Any]]) -> None:
    """What holds of every trace."""
    assert json.loads(json.dumps(events, allow_nan=False)) == events
    assert {e["ph"] for e in events} <= set("MXiCsf")
    assert all(e["ts"] >= 0 for e in events if e["ph"] != "M")
    times = [e["ts"] for e in events if e["ph"] != "M"]
    assert times == sorted(times)
    requests = pid_of(events, "requests")
    for (pid, _), slices in tracks(events).items():
        assert_nested(slices)
        if pid == requests:
            states = [span(e) for e in slices if e["name"] in STATES]
            assert slices[0]["name"] == "queued"
            assert all(a[1] == b[0] for a, b in itertools.pairwise(states)), "no gap between two states"
    for start in of(events, "s"):
        (end,) = of(events, "f", id=start["id"])
        for flow in (start, end):
            around = [
                e for e in tracks(events)[flow["pid"], flow["tid"]] if e["ts"] <= flow["ts"] <= e["ts"] + e["dur"]
            ]
            assert around, "an arrow hangs on a slice"
    for event in of(events, "C", name="blocks"):
        assert min(event["args"].values()) >= 0


@pytest.fixture(scope="module")
def pressed() -> tuple[Any, Timeline, Any]:
    llm, timeline, outputs = traced()
    stats = llm.stats()
    assert stats.num_swaps > 0, "somebody was swapped"
    assert stats.num_preemptions > stats.num_swaps, "and somebody was computed anew"
    return llm, timeline, outputs


def test_a_run_under_pressure_is_sound(pressed: Any) -> None:
    assert_sound(pressed[1].events())


def test_preemptions_and_swaps_are_the_engines(pressed: Any) -> None:
    llm, timeline, outputs = pressed
    events, stats = timeline.events(), llm.stats()
    requests, engine = pid_of(events, "requests"), pid_of(events, "engine")
    on_requests = Counter(e["name"] for e in of(events, "i", pid=requests))
    assert on_requests["swapped out"] == stats.num_swaps
    assert on_requests["preempted"] == stats.num_preemptions - stats.num_swaps
    assert on_requests["swapped in"] == stats.num_swaps, "everybody came back"
    on_steps = Counter(e["name"].split(":")[0] for e in of(events, "i", pid=engine))
    assert on_steps == {name: on_requests[name] for name in ("swapped out", "preempted", "swapped in")}
    assert len(of(events, "s")) == len(of(events, "f")) == stats.num_preemptions
    assert sum(output.metrics.num_preemptions for output in outputs) == stats.num_preemptions
    slices = Counter(e["name"] for e in of(events, "X", pid=requests))
    assert (slices["swapped out"], slices["preempted"]) == (on_requests["swapped out"], on_requests["preempted"])


def test_an_arrow_leads_from_the_step_to_the_time_away(pressed: Any) -> None:
    events = pressed[1].events()
    for start in of(events, "s"):
        (end,) = of(events, "f", id=start["id"])
        begun = [e["name"] for e in tracks(events)[end["pid"], end["tid"]] if e["ts"] == end["ts"]]
        assert start["name"] in begun
        step = [e for e in tracks(events)[start["pid"], start["tid"]] if e["ts"] <= start["ts"] <= e["ts"] + e["dur"]]
        assert step[0]["args"]["preempted"] > 0


def test_swapped_blocks_are_the_same_on_both_kinds_of_track(pressed: Any) -> None:
    events = pressed[1].events()
    for name, of_steps in (("swapped out", "swapped_out_blocks"), ("swapped in", "swapped_in_blocks")):
        moved = sum(e["args"]["blocks"] for e in of(events, "i", pid=pid_of(events, "requests"), name=name))
        steps = of(events, "X", pid=pid_of(events, "engine"))
        assert moved == sum(e["args"].get(of_steps, 0) for e in steps) > 0


def test_every_token_is_in_one_slice(pressed: Any) -> None:
    llm, timeline, outputs = pressed
    events = timeline.events()
    steps = of(events, "X", pid=pid_of(events, "engine"))
    parts = [e for e in of(events, "X", pid=pid_of(events, "requests")) if e["name"] in {"prefill", "decode"}]
    assert len(steps) == llm.stats().num_steps
    assert {e["args"]["step"] for e in steps} == set(range(1, len(steps) + 1))
    for step in steps:
        own = [e for e in parts if e["args"]["step"] == step["args"]["step"]]
        assert sum(e["args"]["tokens"] for e in own) == step["args"]["tokens"]
        assert sum(e["args"]["sampled"] for e in own) == step["args"]["sampled"]
        assert {e["name"] for e in own} == set(step["name"].split(" and ")) - {"nothing to run"}
    assert sum(step["args"]["sampled"] for step in steps) == sum(len(o.outputs[0].token_ids) for o in outputs)
    runs = of(events, "X", pid=pid_of(events, "requests"), name="running")
    for phase in ("prefill", "decode"):
        told = sum(e["args"][f"{phase}_tokens"] for e in runs)
        assert told == sum(e["args"]["tokens"] for e in parts if e["name"] == phase) > 0


def test_a_prompt_is_prefilled_in_chunks_before_anything_is_decoded() -> None:
    _, timeline, _ = traced(["a" * 20, "b" * 9], long_prefill_token_threshold=6, num_blocks=64)
    for (pid, _), slices in tracks(timeline.events()).items():
        if pid == pid_of(timeline.events(), "requests"):
            parts = [(e["name"], e["args"]["tokens"]) for e in slices if e["name"] not in STATES]
            length = 20 if len([p for p in parts if p[0] == "prefill"]) == 4 else 9
            chunks = [6, 6, 6, 2] if length == 20 else [6, 3]
            assert parts == [*(("prefill", n) for n in chunks), *[("decode", 1)] * 15]


def test_counters_add_up_to_the_engines_blocks(pressed: Any) -> None:
    llm, timeline, _ = pressed
    events, kv = timeline.events(), llm.stats().kv
    counters = of(events, "C", name="blocks")
    assert len(counters) == llm.stats().num_steps
    assert {sum(e["args"].values()) for e in counters} == {kv.num_blocks} == {24}
    assert {sum(e["args"].values()) for e in of(events, "C", name="host blocks")} == {kv.num_host_blocks} == {8}
    assert max(e["args"]["used"] for e in of(events, "C", name="host blocks")) > 0
    assert counters[-1]["args"] == {"used": 0, "cached": 0, "free": 24}
    requests = of(events, "C", name="requests")
    assert max(e["args"]["swapped"] for e in requests) > 0
    assert requests[-1]["args"] == {"running": 0, "waiting": 0, "swapped": 0}
    rates = of(events, "C", name="tokens per second")
    assert rates[-1]["args"] == {"computed": 0.0, "sampled": 0.0}
    assert all(e["args"]["computed"] > 0 for e in rates[:-1] if e["args"]["sampled"])


def test_the_hit_rate_is_the_prefix_caches() -> None:
    llm, timeline, _ = traced(["abcdefghijkl" + x for x in "abcd"], enable_prefix_caching=True, num_blocks=64)
    cache = llm.stats().prefix_cache
    assert cache.num_hit_tokens > 0
    last = of(timeline.events(), "C", name="prefix cache hit rate")[-1]
    assert last["args"]["percent"] == pytest.approx(100 * cache.num_hit_tokens / cache.num_queried_tokens)
    assert max(e["args"]["cached"] for e in of(timeline.events(), "C", name="blocks")) > 0


def test_aborts_are_told_on_both_tracks_and_what_goes_on_stays_open() -> None:
    timeline = Timeline()
    llm = make_llm(FakeModel(), plugins=[timeline])
    for name in ("kept", "dropped", "waiting"):
        llm.engine.add_request(name, "abc", greedy(ignore_eos=True), tenant="us", priority=3)
        if name != "waiting":
            llm.engine.step()
    llm.engine.abort("dropped")
    llm.engine.abort("nobody")
    events = timeline.events()
    assert_sound(events)
    ends = {e["args"]["request"]: e["name"] for e in of(events, "i")}
    assert ends == {"dropped": "abort: dropped"}
    assert [e["name"] for e in of(events, "i", pid=pid_of(events, "requests"))] == ["finished: abort"]
    still = [e["name"] for e in of(events, "X") if "open" in e["args"]]
    assert sorted(still) == ["queued", "running"]
    assert all(
        e["args"]["tenant"] == "us" and e["args"]["priority"] == 3 for e in of(events, "X") if e["name"] in STATES
    )


def test_an_error_is_told() -> None:
    def fail(_: Any) -> None:
        message = "boom"
        raise ValueError(message)

    model, timeline = FakeModel(), Timeline()
    llm = make_llm(model, plugins=[timeline])
    model.before_forward = fail
    (output,) = llm.generate("abc", greedy(), use_tqdm=False)
    assert output.error is not None
    assert_sound(timeline.events())
    assert [e["name"] for e in of(timeline.events(), "i")] == ["finished: error", "error: llm-0"]


def test_a_step_that_ran_out_of_memory_sends_all_away() -> None:
    model, timeline = FakeModel(), Timeline()
    llm = make_llm(model, plugins=[timeline], **PRESSURE)

    def fail_once(ids: Any) -> None:
        if len(ids) > 8:
            model.before_forward = None
            message = "no memory"
            raise StepOutOfMemoryError(message)

    model.before_forward = fail_once
    llm.generate(PROMPTS[:3], greedy(ignore_eos=True), use_tqdm=False)
    events = timeline.events()
    assert_sound(events)
    assert Counter(e["name"] for e in of(events, "i", pid=pid_of(events, "requests")))["preempted"] >= 3


def test_steps_in_flight_do_not_blur_the_tracks() -> None:
    executor = DeferredExecutor(2)
    llm, timeline, _ = traced(plugins=[executor], executor="deferred", long_prefill_token_threshold=3)
    assert executor.most_in_flight == 2
    assert llm.stats().num_preemptions > 0
    assert_sound(timeline.events())


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=10),
    num_blocks=st.integers(20, 48),
    host_bytes=st.sampled_from([0, 64, 256, 4096]),
    width=st.integers(1, 3),
    caching=st.booleans(),
)
def test_any_run_is_sound(lengths: list[int], num_blocks: int, host_bytes: int, width: int, *, caching: bool) -> None:
    options = {"num_blocks": num_blocks, "swap_space": f"{host_bytes}B", "enable_prefix_caching": caching}
    options |= {"preemption": "auto" if host_bytes == 0 else "swap"}
    params = TreeParams(width=width, max_tokens=8, ignore_eos=True)
    _, timeline, _ = traced(
        ["a" * n for n in lengths], params=params, plugins=[SamplerPlugin(TreeSampler())], **options
    )
    assert_sound(timeline.events())


def test_watching_changes_no_token() -> None:
    llm = make_llm(FakeModel(), **PRESSURE)
    params = greedy(max_tokens=16, ignore_eos=True)
    plain = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    watched, timeline, outputs = traced()
    assert timeline.records
    assert [o.outputs[0].token_ids for o in outputs] == plain
    assert watched.stats() == llm.stats()


def test_nobody_pays_for_a_timeline_that_is_not_there() -> None:
    llm = make_llm(FakeModel())
    assert not llm.engine.reporter.observers.of_requests
    assert not any(isinstance(observer, Timeline) for observer in llm.engine.reporter.observers.all)
    timeline = Timeline()
    assert isinstance(timeline, RequestObserver)
    llm = make_llm(FakeModel(), plugins=[timeline])
    assert llm.engine.reporter.observers.of_requests == [timeline]
    assert not llm.engine.reporter.follows_branches, "rows cost nothing: a timeline does not ask for them"


def test_a_timeline_writes_to_a_path_and_to_a_file(pressed: Any, tmp_path: Any) -> None:
    _, timeline, _ = pressed
    timeline.write(tmp_path / "run.json", model="fake")
    text = io.StringIO()
    timeline.write(text, model="fake")
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == text.getvalue()
    run = json.loads(text.getvalue())
    assert run == timeline.trace(model="fake")
    assert run["displayTimeUnit"] == "ms"
    assert run["otherData"] == {"format": "folo-run", "model": "fake"}


def test_a_timeline_without_a_run_has_no_events() -> None:
    assert Timeline().events() == []


def test_tracks_have_names_and_numbers_of_their_own(pressed: Any) -> None:
    events = pressed[1].events()
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in of(events, "M", name="thread_name")}
    assert list(names.values()) == ["steps", *(f"llm-{i}" for i in range(len(PROMPTS)))]
    assert len({tid for _, tid in names}) == len(names), "viewers want a thread's number to be its own"
    assert set(tracks(events)) == set(names)


def test_a_request_id_may_come_again() -> None:
    timeline = Timeline()
    llm = make_llm(FakeModel(), plugins=[timeline])
    for _ in range(2):
        llm.engine.add_request("again", "abc", greedy())
        while llm.engine.has_unfinished_requests:
            llm.engine.step()
    events = timeline.events()
    assert_sound(events)
    assert [e["args"]["name"] for e in of(events, "M", name="thread_name")] == ["steps", "again", "again"]


def test_a_branch_has_a_track_of_its_own() -> None:
    timeline = Timeline()
    llm = make_llm(FakeModel(), plugins=[timeline])
    llm.engine.add_request("story", "abcdef", greedy(max_tokens=9, ignore_eos=True))
    for _ in range(4):
        llm.engine.step()
    llm.engine.fork("story", "retold", at=2)
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
    events = timeline.events()
    assert_sound(events)
    names = {e["tid"]: e["args"]["name"] for e in of(events, "M", name="thread_name")}
    parts = Counter((names[e["tid"]], e["name"]) for e in of(events, "X", pid=pid_of(events, "requests")))
    assert parts["retold", "queued"] == parts["retold", "running"] == 1
    assert parts["retold", "prefill"] + parts["retold", "decode"] == 7, "it took two of its nine tokens over"
