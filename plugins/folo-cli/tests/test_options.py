"""A command opens its model in a process set up for a soon start, and leaves the process as it was."""

from __future__ import annotations

import gc
import os

import pytest

from folo_cli import options
from folo_core.errors import ModelLoadError


@pytest.fixture
def seen(monkeypatch):
    """What the process is like while the model loads."""
    state = {}

    def load(model, **_):
        state.update({name: os.environ.get(name) for name in options.PROCESS_DEFAULTS}, collects=gc.isenabled())
        if model == "missing":
            raise ModelLoadError(model)
        return model

    for name in options.PROCESS_DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("folo_core.llm.LLM", load)
    yield state
    gc.unfreeze()


@pytest.mark.parametrize("model", ["demo", "missing"])
def test_the_settings_hold_while_the_model_loads_and_no_longer(seen, model):
    if model == "missing":
        with pytest.raises(ModelLoadError):
            options.open_model(model)
    else:
        assert options.open_model(model) == "demo"
    assert seen == {**options.PROCESS_DEFAULTS, "collects": False}
    assert not options.PROCESS_DEFAULTS.keys() & os.environ.keys()
    assert gc.isenabled()


def test_what_the_user_has_set_stays(seen, monkeypatch):
    monkeypatch.setenv("FOLO_LEAN_START", "0")
    options.open_model("demo")
    assert seen["FOLO_LEAN_START"] == os.environ["FOLO_LEAN_START"] == "0"


def test_a_collector_that_was_off_stays_off(seen):
    gc.disable()
    try:
        options.open_model("demo")
        assert not gc.isenabled()
    finally:
        gc.enable()
