"""``folo config``: what an engine would be built from, whether a file is right, and which fields there are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from folo_core.config import EngineConfig, describe_fields, dumps_json, dumps_toml, load
from folo_core.errors import ConfigError
from folo_core.plugins.manager import load_registry

if TYPE_CHECKING:
    from folo_core.plugins.registry import Registry

app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigFile = Annotated[Path | None, typer.Argument(help="A .toml or .json file; none for the defaults.")]
Env = Annotated[bool, typer.Option(help="Read FOLO_SECTION__FIELD variables over the file.")]


@app.command()
def show(file: ConfigFile = None, env: Env = True, as_json: AsJson = False) -> None:
    """Print the whole configuration, defaults and plugin sections included, as TOML that can be edited and loaded."""
    try:
        config = _load(file or {"model": {"model": "demo"}}, env=env)
        text = dumps_json(config) if as_json else dumps_toml(config)
    except ConfigError as error:
        _refuse(error)
    typer.echo(text, nl=False)


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="A .toml or .json file.")], env: Env = False) -> None:
    """Check a file, plugin sections included; print every problem, one a line, and exit with 2 if there is any."""
    try:
        _load(file, env=env)
    except ConfigError as error:
        _refuse(error)
    typer.echo(f"{file}: valid")


@app.command()
def schema(as_json: AsJson = False) -> None:
    """List every field with its default and what it accepts."""
    rows = describe_fields(EngineConfig)
    for name, cls in _sections(load_registry()).items():
        rows += describe_fields(cls, f"plugins.{name}.")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["field"]) for row in rows)
    for row in rows:
        default = "required" if row["required"] else json.dumps(row["default"])
        typer.echo(f"{row['field']:{width}}  {default:12}  {row['accepts']}")


def _load(source: Path | dict[str, Any], *, env: bool) -> EngineConfig:
    registry = load_registry()
    migrations = {(p.spec.section, p.spec.from_version): p.spec.migrate for p in registry.all("config_migrations")}
    variables = os.environ if env else None
    return load(source, env=variables, sections=_sections(registry), migrations=migrations)


def _sections(registry: Registry) -> dict[str, type]:
    return {part.name: part.spec.section_type for part in registry.all("config_sections")}


def _refuse(error: ConfigError) -> NoReturn:
    for problem in error.problems:
        typer.echo(problem, err=True)
    raise typer.Exit(2) from error
