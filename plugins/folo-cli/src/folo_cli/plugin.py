"""Entry point: names the subcommands; the module of each is imported only when it is run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import CommandSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer


def _app_of(module: str) -> Callable[[], typer.Typer]:
    def build() -> typer.Typer:
        app: typer.Typer = importlib.import_module(f"folo_cli.{module}").app
        return app

    return build


@hookimpl
def folo_commands() -> list[CommandSpec]:
    """Offer ``generate``, ``chat``, ``bench``, ``plugins`` and ``config``."""
    commands = {
        "generate": "Complete prompts and stream the text.",
        "chat": "Talk with a model in the terminal.",
        "bench": "Measure latency and throughput, alone or against another engine.",
        "plugins": "List, inspect, diagnose and start plugins.",
        "config": "Show, check and describe configurations.",
    }
    return [CommandSpec(name=name, help=help_, factory=_app_of(name)) for name, help_ in commands.items()]
