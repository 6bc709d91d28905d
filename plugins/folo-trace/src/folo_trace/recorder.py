"""Listens to an engine while it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ObserverSpec

if TYPE_CHECKING:
    from folo_core.engine.observer import BranchRecord, StepRecord


class Recorder:
    """A plugin object and the observer it offers, in one: hand it to ``load_registry(extra=[recorder])``.

    An engine that was built without one records nothing and pays nothing.
    """

    __name__ = "folo-trace-recorder"

    def __init__(self) -> None:
        self.records: dict[str, list[BranchRecord]] = {}
        """What happened to each request, step by step, by request id."""

    def on_step(self, record: StepRecord) -> None:
        """Steps as such are not kept."""

    def on_branches(self, record: BranchRecord) -> None:
        """Keep what a step did to one request."""
        self.records.setdefault(record.request_id, []).append(record)

    @hookimpl
    def folo_observers(self) -> list[ObserverSpec]:
        """Offer this object itself."""
        return [ObserverSpec(name="trace", help="keeps what strategies do to sequences", factory=lambda _: self)]
