"""Entry point: offers ``folo trace``, whose module is imported only when it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import CommandSpec

if TYPE_CHECKING:
    import typer


def _build() -> typer.Typer:
    from folo_trace.command import app

    return app


@hookimpl
def folo_commands() -> list[CommandSpec]:
    """Offer ``trace``."""
    return [CommandSpec(name="trace", help="Draw the search tree of a generation as one page.", factory=_build)]
