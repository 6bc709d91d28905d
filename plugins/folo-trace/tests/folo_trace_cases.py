"""The commands of this distribution around a fake model, for the tests in this folder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from folo_core.cli import main as main_module
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer
from folo_trace import opening

if TYPE_CHECKING:
    import pytest

PRESSURE = ["--num-blocks", "24", "--block-size", "4", "--swap-space", "256B", "--preemption", "swap"]
"""Blocks of 32 bytes: eight of them fit on the host, so that some requests are swapped and others computed anew."""


OPEN_MODEL = opening.open_model


def stand_in(monkeypatch: pytest.MonkeyPatch, model: FakeModel, *plugins: object) -> None:
    """Let a fake model, and further plugins, stand among the installed ones."""
    parts = [FakePlugin(model, FakeTokenizer()), *plugins]
    settings = {"loader": "fake", "attention": "fake", "num_blocks": 256, "block_size": 4}
    monkeypatch.setattr(opening, "open_registry", lambda *watchers: load_registry(extra=[*watchers, *parts]))
    monkeypatch.setattr(opening, "open_model", lambda registry, options: OPEN_MODEL(registry, settings | options))


def folo(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> int:
    """Run a command as the installed ``folo`` does and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["folo", command, *arguments, "--model", "fake"])
    try:
        main_module.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return 0


def interrupt_after(model: FakeModel, num_steps: int) -> None:
    """Press Ctrl-C in the step after so many."""
    left = [num_steps]

    def press(_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            model.before_forward = None
            raise KeyboardInterrupt

    model.before_forward = press
