"""Entry point: offers ``folo trace`` and ``folo top``; the module of each is imported only when it is run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import CommandSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer


def _app_of(module: str) -> Callable[[], typer.Typer]:
    def build() -> typer.Typer:
        app: typer.Typer = import_module(f"folo_trace.{module}").app
        return app

    return build


@hookimpl
def folo_commands() -> list[CommandSpec]:
    """Offer ``trace`` and ``top``."""
    return [
        CommandSpec(
            name="trace",
            help="Draw the search tree of a generation, or a run's steps and requests for Perfetto.",
            factory=_app_of("command"),
        ),
        CommandSpec(
            name="top",
            help="Run a workload and watch batch, queue, blocks and hit rate live.",
            factory=_app_of("top_command"),
        ),
    ]
