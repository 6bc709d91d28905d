"""Plugins and parts as plain, JSON-ready dictionaries, for ``folo plugins`` and for documentation."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import attrs

from folo_core.plugins.fields import own_fields

if TYPE_CHECKING:
    from folo_core.plugins.registry import LoadedPlugin, Part, Registry


def describe_part(part: Part) -> dict[str, Any]:
    """What ``folo plugins show`` says of one part."""
    described: dict[str, Any] = {
        "name": part.name,
        "help": part.spec.help,
        "api_version": part.spec.api_version,
        "capabilities": sorted(part.spec.capabilities),
    }
    for option in ("stage", "priority", "section", "from_version"):
        if hasattr(part.spec, option):
            described[option] = getattr(part.spec, option)
    if hasattr(part.spec, "sampling_types"):
        described["sampling_types"] = sorted(kind.value for kind in part.spec.sampling_types)
    options = getattr(part.spec, "params_type", None) or getattr(part.spec, "section_type", None)
    if options is not None:
        described["params"] = {
            "class": f"{options.__module__}.{options.__qualname__}",
            "doc": inspect.getdoc(options) or "",
            "fields": own_fields(options),
        }
    return described


def describe_plugin(plugin: LoadedPlugin) -> dict[str, Any]:
    """A loaded plugin with everything it offers, by hook."""
    hooks: dict[str, list[dict[str, Any]]] = {}
    for part in plugin.parts:
        hooks.setdefault(f"folo_{part.kind}", []).append(describe_part(part))
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "status": "loaded",
        "summary": plugin.summary,
        "hooks": hooks,
    }


def list_plugins(registry: Registry) -> list[dict[str, Any]]:
    """Every installed plugin in one line each: loaded, broken and blocked ones, sorted by name."""
    rows = [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "status": "loaded",
            "summary": plugin.summary,
            "parts": {
                kind: [part.name for part in group]
                for kind, group in itertools.groupby(plugin.parts, key=lambda part: part.kind)
            },
        }
        for plugin in registry.plugins
    ]
    rows += [attrs.asdict(broken, filter=_without_cause) | {"status": "broken"} for broken in registry.broken]
    rows += [attrs.asdict(blocked) | {"status": "blocked"} for blocked in registry.blocked]
    return sorted(rows, key=lambda row: (row["name"], row["distribution"]))


def diagnose(registry: Registry) -> list[dict[str, str]]:
    """Everything that is wrong with what is installed; empty when all is well."""
    findings = [
        {"kind": broken.problem, "plugin": broken.name, "distribution": broken.distribution, "message": str(broken)}
        for broken in registry.broken
    ]
    for clash in registry.clashes:
        names = " ".join(part.plugin for part in clash.parts)
        owners = " ".join(part.distribution for part in clash.parts)
        findings.append({"kind": "clash", "plugin": names, "distribution": owners, "message": str(clash)})
    for shadow in registry.shadowed:
        text = (
            f"{shadow.distribution} {shadow.version} in {shadow.location} is hidden by {shadow.used_version} "
            f"in {shadow.used_location}: uninstall one"
        )
        findings.append({"kind": "shadowed", "plugin": "", "distribution": shadow.distribution, "message": text})
    for plugin in registry.plugins:
        if plugin.imported_torch:
            text = f"plugin {plugin.name} imports torch with its entry point: import it inside the factories"
            findings.append(
                {"kind": "heavy", "plugin": plugin.name, "distribution": plugin.distribution, "message": text}
            )
    for name in registry.unknown_blocks:
        text = f"{name!r} is to be blocked, but no such plugin is installed: correct or drop the name"
        findings.append({"kind": "unknown-block", "plugin": name, "distribution": "", "message": text})
    return findings


def _without_cause(attribute: attrs.Attribute[Any], _value: object) -> bool:
    return attribute.name != "cause"
