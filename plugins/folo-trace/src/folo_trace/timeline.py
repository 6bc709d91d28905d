"""Listens to an engine while it runs, and writes what it did when, in the Trace Event Format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ObserverSpec
from folo_trace.events import trace_events

if TYPE_CHECKING:
    from typing import TextIO

    from folo_core.engine.observer import RequestRecord, StepRecord


class Timeline:
    """A plugin object and the observer it offers, in one: hand it to ``load_registry(extra=[timeline])``.

    It keeps a record of every step and of every event of a request, and makes events of them when it is asked to.
    One timeline follows one engine.
    """

    __name__ = "folo-trace-timeline"

    def __init__(self) -> None:
        self.records: list[StepRecord | RequestRecord] = []
        """All that was told, in order."""

    def on_step(self, record: StepRecord) -> None:
        """Keep a step."""
        self.records.append(record)

    def on_request(self, record: RequestRecord) -> None:
        """Keep an event of a request."""
        self.records.append(record)

    @hookimpl
    def folo_observers(self) -> list[ObserverSpec]:
        """Offer this object itself."""
        return [ObserverSpec(name="timeline", help="keeps steps and what happens to requests", factory=lambda _: self)]

    def events(self) -> list[dict[str, Any]]:
        """Return the events so far: names of tracks first, then all others by time. The README describes them."""
        return trace_events(self.records)

    def trace(self, **about: object) -> dict[str, Any]:
        """Return the whole trace, as a viewer opens it; ``about`` is kept beside the events."""
        return {"traceEvents": self.events(), "displayTimeUnit": "ms", "otherData": {"format": "folo-run", **about}}

    def write(self, file: str | Path | TextIO, **about: object) -> None:
        """Write the trace as JSON; ``ui.perfetto.dev`` and ``chrome://tracing`` open it.

        Args:
            file: where to, or an open text file.
            about: plain values to keep beside the events, such as the model's name.

        Raises:
            OSError: the file cannot be written.
        """
        if isinstance(file, (str, Path)):
            with Path(file).open("w", encoding="utf-8") as opened:
                self.write(opened, **about)
            return
        json.dump(self.trace(**about), file, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        file.write("\n")
