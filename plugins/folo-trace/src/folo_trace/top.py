"""Watches an engine live: batch, queue, blocks and hit rate, while it runs."""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from folo_core.errors import ConfigError
from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ObserverSpec
from folo_trace import view
from folo_trace.gauges import Gauges

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType

    from folo_core.engine.observer import RequestRecord, StepRecord


class Mode(Enum):
    """How to show what goes on."""

    LIVE = "live"
    """A view that renews itself, for a terminal."""
    LINES = "lines"
    """A line of plain text now and then."""
    JSON = "json"
    """A line of JSON now and then."""


INTERVALS = {Mode.LIVE: 0.25, Mode.LINES: 1.0, Mode.JSON: 1.0}
"""Seconds between two looks, unless told otherwise."""


class Top:
    """A plugin object, the observer it offers and the view of what it hears, in one.

    Hand it to ``load_registry(extra=[top])`` and run the engine inside ``with top:``; leaving prints the summary.
    It is the engine's steps that renew the view: between two steps nothing changes.

    Args:
        mode: ``live``, ``lines`` or ``json``; None for ``live`` on a terminal and ``lines`` elsewhere.
        interval: seconds between two looks; None for what suits the mode.
        title: what stands above the view.
        console: where to show it; None for stdout.

    Raises:
        ConfigError: the mode is unknown, or the interval is no time.
    """

    __name__ = "folo-top"

    def __init__(
        self,
        mode: str | None = None,
        *,
        interval: float | None = None,
        title: str = "folo top",
        console: Console | None = None,
    ) -> None:
        self.console = Console(file=sys.stdout) if console is None else console
        self.mode = self._choose(mode)
        self.interval = _checked(INTERVALS[self.mode] if interval is None else interval)
        self.title = title
        self.gauges = Gauges()
        self.failure: OSError | None = None
        """Why nothing is shown any more: whoever read the output is gone, or the disk is full."""
        self._shown_at = time.perf_counter()
        self._live: Live | None = None

    def _choose(self, mode: str | None) -> Mode:
        if mode is None:
            return Mode.LIVE if self.console.is_terminal and not self.console.is_dumb_terminal else Mode.LINES
        try:
            return Mode(mode)
        except ValueError:
            message = f"mode: {mode!r}: must be live, lines or json, or None for what suits the output"
            raise ConfigError([message]) from None

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step, and show what has become of all."""
        self.gauges.on_step(record)
        now = time.perf_counter()
        if now - self._shown_at >= self.interval and self.failure is None:
            self._shown_at = now
            self._show()

    def on_request(self, record: RequestRecord) -> None:
        """Take note of an event of a request."""
        self.gauges.on_request(record)

    @hookimpl
    def folo_observers(self) -> list[ObserverSpec]:
        """Offer this object itself."""
        return [ObserverSpec(name="top", help="shows what goes on, live", factory=lambda _: self)]

    def figures(self) -> dict[str, Any]:
        """Return what the view shows as plain data. The README describes it."""
        return self.gauges.figures()

    def summary(self) -> dict[str, Any]:
        """Return what the run has come to so far as plain data."""
        return self.gauges.summary()

    def __rich__(self) -> RenderableType:
        return view.view(self.figures(), self.title, self.console.size)

    def __enter__(self) -> Self:
        if self.mode is Mode.LIVE:
            self._live = Live(self, console=self.console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the terminal as it was, and tell the summary if anything has run."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.gauges.num_steps == 0 or self.failure is not None:
            return
        if self.mode is Mode.JSON:
            self._write(json.dumps({"kind": "summary", "complete": kind is None, **self.summary()}))
            return
        rows = view.summary(self.summary())
        if self.mode is Mode.LIVE:
            self.console.print(view.grid((name, Text(text)) for name, text in rows))
        else:
            self._write("\n".join(f"{name + ':':{view.LABEL_WIDTH}} {text}" for name, text in rows))

    def _show(self) -> None:
        try:
            if self._live is not None:
                self._live.refresh()
            elif self.mode is Mode.JSON:
                self._write(json.dumps({"kind": "sample", **self.figures()}))
            elif self.mode is Mode.LINES:
                self._write(view.line(self.figures()))
        except OSError as error:
            self.failure = error  # an observer that raises is only dropped: whoever runs the engine should know

    def _write(self, text: str) -> None:
        """Write a line, past everything that a console does to texts."""
        self.console.file.write(text + "\n")
        self.console.file.flush()


def _checked(interval: float) -> float:
    if not 0 <= interval < float("inf"):
        message = f"interval: {interval!r}: must be a number of seconds, 0 for after every step"
        raise ConfigError([message])
    return float(interval)
