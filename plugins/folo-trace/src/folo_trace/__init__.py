"""Shows what an engine does: a generation's tree as one page, a run in time, and what goes on live.

Importing this imports no torch: the parts are loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folo_trace.page import render
    from folo_trace.recorder import Recorder
    from folo_trace.timeline import Timeline
    from folo_trace.top import Top
    from folo_trace.tree import build_trace

__all__ = ["Recorder", "Timeline", "Top", "build_trace", "render"]

_HOMES = {
    "Recorder": "folo_trace.recorder",
    "Timeline": "folo_trace.timeline",
    "Top": "folo_trace.top",
    "build_trace": "folo_trace.tree",
    "render": "folo_trace.page",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a class or a function)
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
