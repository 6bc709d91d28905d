"""``folo plugins``: what is installed, what each plugin offers, what is wrong, and a start for a new one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from folo_cli.describe import describe_plugin, diagnose, list_plugins
from folo_cli.scaffold import Kind, create_plugin
from folo_core.errors import PluginError
from folo_core.plugins.manager import load_registry

if TYPE_CHECKING:
    from folo_core.plugins.registry import Registry

app = typer.Typer(help="List, inspect, diagnose and start plugins.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """Show every installed plugin: loaded, broken and blocked ones."""
    rows = list_plugins(_load())
    if as_json:
        _print_json(rows)
        return
    table = [("PLUGIN", "DISTRIBUTION", "STATUS", "OFFERS")]
    table += [(row["name"], f"{row['distribution']} {row['version']}", row["status"], _offers(row)) for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        typer.echo("  ".join([*cells, line[3]]).rstrip())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A plugin's or distribution's name.")],
    as_json: AsJson = False,
) -> None:
    """Show a plugin's hooks and parts, with the options of each."""
    registry = _load()
    found = [describe_plugin(plugin) for plugin in registry.plugins if name in {plugin.name, plugin.distribution}]
    rows = list_plugins(registry)
    found += [row for row in rows if name in {row["name"], row["distribution"]} and row["status"] != "loaded"]
    if not found:
        known = ", ".join(row["name"] for row in rows) or "none"
        raise PluginError(f"no plugin or distribution is called {name!r}; installed: {known}")
    if as_json:
        _print_json(found if len(found) > 1 else found[0])
        return
    for plugin in found:
        typer.echo("\n".join(_plugin_lines(plugin)))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is broken, clashing, shadowed, incompatible or misspelt. Exits with 1 if anything is."""
    findings = diagnose(_load())
    if as_json:
        _print_json({"ok": not findings, "findings": findings})
    for finding in [] if as_json else findings:
        typer.echo(f"{finding['kind']}: {finding['message']}")
    if findings:
        raise typer.Exit(1)
    if not as_json:
        typer.echo("All plugins are well.")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The distribution's name, such as folo-dice.")],
    kind: Annotated[Kind, typer.Option(help="What the plugin offers.")] = Kind.SAMPLER,
    directory: Annotated[Path, typer.Option(help="Folder to write the project's folder into.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Write a working plugin distribution, with tests."""
    try:
        project, files = create_plugin(name, kind, directory)
    except OSError as error:
        raise PluginError(f"--directory: {str(directory)!r}: cannot be written: {error}", plugin=name) from error
    if as_json:
        _print_json({"name": name, "kind": kind.value, "path": str(project), "files": files})
        return
    typer.echo(f"{project} holds a working {kind.value}. Next:")
    typer.echo(f"  cd {project}\n  python -m pip install -e '.[test]'\n  python -m pytest")
    typer.echo(f"  python -m pytest --folo-conformance {name}\n  folo plugins show {name}")


def _load() -> Registry:
    """Load everything, quietly: these commands print by themselves what is broken."""
    logging.getLogger("folo_core.plugins").setLevel(logging.ERROR)
    return load_registry()


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _offers(row: dict[str, Any]) -> str:
    if row["status"] == "loaded":
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in row["parts"].items())
    return str(row.get("error") or f"by {row['reason']}")


def _plugin_lines(plugin: dict[str, Any]) -> list[str]:
    lines = [f"{plugin['name']} ({plugin['distribution']} {plugin['version']}), {plugin['status']}"]
    lines += [f"  {plugin[key]}" for key in ("summary", "error", "reason") if plugin.get(key)]
    for hook, parts in plugin.get("hooks", {}).items():
        lines.append(f"  {hook}")
        for part in parts:
            lines += _part_lines(part)
    return lines


def _part_lines(part: dict[str, Any]) -> list[str]:
    lines = [f"    {part['name']}: {part['help']}"]
    facts: dict[str, Any] = {key: part[key] for key in ("stage", "priority", "section", "from_version") if key in part}
    facts |= {key: ", ".join(part[key]) for key in ("sampling_types", "capabilities") if part.get(key)}
    lines += [f"      {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
    if params := part.get("params"):
        lines.append(f"      options: {params['class']}")
        lines += [
            f"        {field['name']}: {field['type']}"
            + ("" if field["required"] else f" = {field['default']!r}")
            + (f"  {' '.join(field['doc'].split())}" if field["doc"] else "")
            for field in params["fields"]
        ]
    return lines
