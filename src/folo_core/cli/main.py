"""``folo``: finds the subcommand among those of all plugins and imports only that one, so that help stays fast."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from folo_core.errors import FoloError

if TYPE_CHECKING:
    from folo_core.plugins.registry import Part

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


@cache
def commands() -> dict[str, Part]:
    """Every subcommand that an installed plugin offers, by name. Those of Folo's own come from folo-cli."""
    from folo_core.plugins.manager import load_registry

    # A broken plugin is told of by the command that runs, and by ``folo plugins doctor``, not by every listing.
    log = logging.getLogger("folo_core.plugins")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        parts = load_registry().all("commands")
    finally:
        log.setLevel(level)
    # A contested name is nobody's: its parts go by their qualified names, and every other command still works.
    count = Counter(part.name for part in parts)
    return {part.name if count[part.name] == 1 else part.qualified_name: part for part in parts}


class LazyGroup(TyperGroup):
    """A command group whose members are imported only to be run; help reads their one-liners from the registry."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 (typer's context)
        """Name every subcommand."""
        return sorted(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 (typer's context and command)
        """Return a stand-in that only has a name and help."""
        part = commands().get(cmd_name)
        return None if part is None else TyperCommand(cmd_name, help=part.spec.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 (typer's context and command)
        """Build and return the command to run."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if stand_in is None or name is None:
            return name, stand_in, rest
        command = typer.main.get_command(commands()[name].build())
        command.name = name
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's context)
        """Run the subcommand; Ctrl-C and a closed pipe end it with their customary exit status."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write("folo: interrupted\n")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader is gone; keep the interpreter from flushing into the closed pipe once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Folo: an LLM inference engine in which every decision is a plugin.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time that help takes
)


def _show_version(value: bool) -> None:
    if value:
        from folo_core import __version__

        typer.echo(f"folo-core {__version__}")
        raise typer.Exit


@app.callback()
def root(
    plugin: list[str] = typer.Option(
        [], "-p", "--plugin", help="'no:NAME' leaves a plugin out of this run; may be repeated.", metavar="no:NAME"
    ),
    version: bool = typer.Option(  # noqa: ARG001 (typer's way to declare flags)
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Leave out blocked plugins, whichever subcommand runs."""
    for entry in plugin:
        if not entry.startswith("no:") or len(entry) == len("no:"):
            message = f"-p {entry!r}: write no:NAME"
            raise FoloError(message)
    blocked = [os.environ.get("FOLO_BLOCK", ""), *(entry.removeprefix("no:") for entry in plugin)]
    if plugin:
        os.environ["FOLO_BLOCK"] = ",".join(filter(None, blocked))
        commands.cache_clear()


def main() -> None:
    """Run the command line and exit: 2 for errors the user can mend, 130 after Ctrl-C, 141 for a closed pipe."""
    logging.basicConfig(level=os.environ.get("FOLO_LOG", "WARNING").upper(), format="%(levelname)s %(message)s")
    try:
        app()
    except FoloError as error:
        sys.stderr.write(f"folo: {error}\n")
        sys.exit(2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"folo: {error.strerror or error}{where}: what was written before is kept\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
