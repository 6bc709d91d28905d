"""From an engine's records to the Trace Event Format: slices, instants, flows and counters on tracks.

The format is Google's "Trace Event Format" (2016), which Perfetto and ``chrome://tracing`` open. Times are whole
microseconds: viewers cut fractions off, each in its own way, and slices that touched would overlap.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from folo_core.engine.observer import RequestEvent, StepRecord
from folo_trace.lives import DECODE, FINISHED, PREFILL, RUNNING, SWAPPED, Life

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from folo_core.engine.observer import RequestRecord

    Event = dict[str, Any]

ENGINE, REQUESTS = 1, 2
"""The two groups of tracks, which the format calls processes."""
STEPS = 1
"""The engine's track of steps, which the format calls a thread."""
IDLE_US = 1000
"""A pause between two steps that lets the rates fall to zero."""
LEAVINGS = {RequestEvent.PREEMPTED: "preempted", RequestEvent.SWAPPED_OUT: "swapped out"}
MARKS = LEAVINGS | {RequestEvent.SWAPPED_IN: "swapped in"}
"""Events of requests that the track of steps shows too."""


def trace_events(records: Sequence[StepRecord | RequestRecord]) -> list[Event]:
    """Return the events of what an engine told: names of tracks first, then all others by time, parents first."""
    if not records:
        return []
    begins = [record.started if isinstance(record, StepRecord) else record.time for record in records]
    writer = _Writer(min(begins))
    for record in records:
        if isinstance(record, StepRecord):
            writer.on_step(record)
        else:
            writer.on_request(record)
    events = writer.finish()
    events.sort(key=_place)
    return events


def _place(event: Event) -> tuple[bool, int, int]:
    """Order events: names, then by time; a state before the parts of steps inside it, and both before all else."""
    is_part = event["pid"] == REQUESTS and event["name"] in {PREFILL, DECODE}
    return event["ph"] != "M", event.get("ts", 0), is_part if event["ph"] == "X" else 2


class _Track:
    """One request's track: its states, one after another, and inside them the steps that it ran in."""

    def __init__(self, number: int, record: RequestRecord) -> None:
        self.number = number
        self.life = Life.begin(record)
        self.since = 0
        """When its present state began."""
        self.ran = (0, 0)
        """When it last began to run, and when it left off; -1 as long as it goes on."""
        self.run_facts: Event = {}
        """What its latest run shows. The run's last step comes back after the event that ends the run."""


class _Writer:
    """Makes events of records, in the order in which they were told. Times are microseconds since ``origin``."""

    def __init__(self, origin: float) -> None:
        self.origin = origin
        self.now = 0
        """The latest moment that anybody told of."""
        self.events: list[Event] = [
            *_track_group(ENGINE, "engine", order=0),
            *_track_group(REQUESTS, "requests", order=1),
            *_track_names(ENGINE, STEPS, "steps"),
        ]
        self.tracks: dict[str, _Track] = {}
        """The latest request of each id."""
        self.open: dict[str, _Track] = {}
        # Viewers take a thread for its process's first if the two have one number, and like threads to have their own.
        self._numbers, self._flows = itertools.count(REQUESTS + 1), itertools.count(1)
        self._marks: list[tuple[int, _Track, RequestRecord]] = []
        """What the step that has not come back yet did to requests."""
        self._rates_since = -1
        """When the last step ended; -1 before the first."""

    def finish(self) -> list[Event]:
        """Close what is open, and return all events."""
        self._flush_marks(None)
        for track in self.open.values():
            self._close_state(track, self.now, track.life.state, open="the record ends here")
        if self._rates_since >= 0:
            self._rates(self._rates_since, 0.0, 0.0)
        return self.events

    def on_request(self, record: RequestRecord) -> None:
        """Let a request enter its next state."""
        now = self._moment(record.time)
        is_new = record.request_id not in self.open
        track = self._open_track(record) if is_new else self.open[record.request_id]
        left = track.life.state
        track.life.follow(record)
        if not is_new:
            self._close_state(track, now, left)
        track.since = now
        if track.life.state == RUNNING:
            track.ran, track.run_facts = (now, -1), {"prefill_tokens": 0, "decode_tokens": 0}
        if record.event in MARKS:
            args = {} if record.event is RequestEvent.PREEMPTED else {"blocks": track.life.num_blocks}
            self._instant(REQUESTS, track.number, now, MARKS[record.event], args)
            self._marks.append((now, track, record))
        if track.life.state == FINISHED:
            self._end(track, now)

    def on_step(self, record: StepRecord) -> None:
        """Draw a step, on its own track and on those of the requests in it, and set the counters."""
        begin, end = self._moment(record.started), self._moment(record.started + record.seconds)
        phases = {self._draw_part(request_id, record, begin, end) for request_id in record.tokens_of} - {None}
        name = " and ".join(sorted(map(str, phases), reverse=True)) or "nothing to run"
        self._slice(ENGINE, STEPS, (begin, end), name, _facts_of_step(record))
        self._flush_marks((begin, end))
        self._count(record, begin, end)

    def _moment(self, time: float) -> int:
        moment = round((time - self.origin) * 1e6)
        self.now = max(self.now, moment)
        return moment

    def _open_track(self, record: RequestRecord) -> _Track:
        track = _Track(next(self._numbers), record)
        self.tracks[record.request_id] = self.open[record.request_id] = track
        self.events += _track_names(REQUESTS, track.number, record.request_id)
        return track

    def _close_state(self, track: _Track, now: int, state: str, **more: object) -> None:
        """Draw the state that a request has left."""
        life = track.life
        args: Event = {}
        if state == RUNNING:
            track.ran = (track.ran[0], now)
            args = track.run_facts
        elif state == SWAPPED:
            args["blocks"] = life.num_blocks
        args |= {"prompt_tokens": life.num_prompt_tokens, "output_tokens": life.num_output_tokens}
        args |= {"tenant": life.tenant} if life.tenant else {}
        args |= {"priority": life.priority} if life.priority else {}
        self._slice(REQUESTS, track.number, (track.since, now), state, args | more if more else args)

    def _end(self, track: _Track, now: int) -> None:
        del self.open[track.life.request_id]
        reason = track.life.finish_reason
        args = {"request": track.life.request_id, "output_tokens": track.life.num_output_tokens}
        self._instant(REQUESTS, track.number, now, f"finished: {reason}", args)
        if reason in {"abort", "error"}:
            self._instant(ENGINE, STEPS, now, f"{reason}: {track.life.request_id}", args)

    def _draw_part(self, request_id: str, record: StepRecord, begin: int, end: int) -> str | None:
        """Draw a request's part of a step, as far as the request ran while the step did; return what it was."""
        track = self.tracks.get(request_id)
        if track is None:
            return None
        phase = track.life.ran(record)
        tokens = record.tokens_of[request_id]
        track.run_facts[f"{phase}_tokens"] += tokens
        first, last = max(begin, track.ran[0]), end if track.ran[1] < 0 else min(end, track.ran[1])
        if first <= last:
            args = {"step": record.step, "tokens": tokens, "sampled": record.sampled_of.get(request_id, 0)}
            self._slice(REQUESTS, track.number, (first, last), phase, args)
        return phase

    def _flush_marks(self, step: tuple[int, int] | None) -> None:
        """Show on the track of steps who left and who came back; arrows lead to those who left."""
        for now, track, record in self._marks:
            name = f"{MARKS[record.event]}: {record.request_id}"
            self._instant(ENGINE, STEPS, now, name, {"request": record.request_id})
            if record.event in LEAVINGS and step is not None and step[0] <= now <= step[1]:
                flow = {"cat": "preemption", "name": MARKS[record.event], "id": next(self._flows), "ts": now}
                self.events.append({"ph": "s", "pid": ENGINE, "tid": STEPS, **flow})
                self.events.append({"ph": "f", "bp": "e", "pid": REQUESTS, "tid": track.number, **flow})
        self._marks.clear()

    def _count(self, record: StepRecord, begin: int, end: int) -> None:
        """Set the counters: rates for as long as the step took, all others from its end on."""
        if 0 <= self._rates_since < begin - IDLE_US:
            self._rates(self._rates_since, 0.0, 0.0)
        self._rates_since = end
        if record.seconds > 0:
            self._rates(begin, record.num_tokens / record.seconds, record.num_sampled / record.seconds)
        waiting = record.num_waiting - record.num_swapped
        self._counter(end, "requests", running=record.num_running, waiting=waiting, swapped=record.num_swapped)
        used = record.total_blocks - record.free_blocks - record.cached_blocks
        self._counter(end, "blocks", used=used, cached=record.cached_blocks, free=record.free_blocks)
        if record.total_host_blocks:
            free = record.total_host_blocks - record.used_host_blocks
            self._counter(end, "host blocks", used=record.used_host_blocks, free=free)
        if record.hit_tokens:
            self._counter(end, "prefix cache hit rate", percent=100 * record.hit_tokens / record.queried_tokens)

    def _rates(self, now: int, computed: float, sampled: float) -> None:
        self._counter(now, "tokens per second", computed=computed, sampled=sampled)

    def _slice(self, group: int, track: int, span: tuple[int, int], name: str, args: Event) -> None:
        begin, end = span
        times = {"ts": begin, "dur": end - begin}
        self.events.append({"ph": "X", "pid": group, "tid": track, **times, "name": name, "args": args})

    def _instant(self, group: int, track: int, now: int, name: str, args: Event) -> None:
        self.events.append({"ph": "i", "s": "t", "pid": group, "tid": track, "ts": now, "name": name, "args": args})

    def _counter(self, now: int, name: str, **values: float) -> None:
        self.events.append({"ph": "C", "pid": ENGINE, "ts": now, "name": name, "args": values})


def _facts_of_step(record: StepRecord) -> Event:
    """Return what a viewer shows of a step; what did not happen in it is left out."""
    facts = {"step": record.step, "tokens": record.num_tokens, "sequences": record.num_seqs}
    facts |= {"requests": len(record.tokens_of), "sampled": record.num_sampled}
    rare = {
        "draft_tokens": record.num_draft_tokens,
        "accepted_tokens": record.num_accepted_tokens,
        "preempted": record.num_preempted,
        "swapped_out_blocks": record.swapped_out_blocks,
        "swapped_in_blocks": record.swapped_in_blocks,
    }
    return facts | {name: count for name, count in rare.items() if count}


def _track_group(group: int, name: str, order: int) -> Iterable[Event]:
    yield {"ph": "M", "pid": group, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": group, "name": "process_sort_index", "args": {"sort_index": order}}


def _track_names(group: int, track: int, name: str) -> Iterable[Event]:
    yield {"ph": "M", "pid": group, "tid": track, "name": "thread_name", "args": {"name": name}}
    yield {"ph": "M", "pid": group, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}
