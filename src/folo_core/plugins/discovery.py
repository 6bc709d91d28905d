"""What is installed: the entry points of the group ``folo``, read from metadata alone; nothing is imported here."""

from __future__ import annotations

import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from folo_core.plugins.registry import BrokenPlugin, ShadowedDistribution
from folo_core.plugins.specs import NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP = "folo"
"""The entry-point group of Folo's plugins."""


@attrs.frozen(kw_only=True)
class Source:
    """Something to load: an entry point, or a module given by name or by hand."""

    name: str
    distribution: str = "(none)"
    version: str = "?"
    summary: str = ""
    load: Callable[[], object] = attrs.field(repr=False, eq=False)


@attrs.define
class Discovery:
    """What a look at ``sys.path`` found."""

    sources: list[Source] = attrs.field(factory=list)
    shadowed: list[ShadowedDistribution] = attrs.field(factory=list)
    broken: list[BrokenPlugin] = attrs.field(factory=list)


def discover() -> Discovery:
    """Every entry point of the group, sorted by name; each distribution once, the copy that Python would import."""
    found = Discovery()
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if f"[{GROUP}]" not in _entry_point_text(distribution):
            continue
        name, version, summary = _identity(distribution)
        here = (version, _location(distribution))
        used = _first_on_path(name) or here
        if here != used:
            shadow = ShadowedDistribution(
                distribution=name, version=version, location=here[1], used_version=used[0], used_location=used[1]
            )
            found.shadowed += [shadow] if shadow not in found.shadowed else []
        elif canonical(name) not in seen:  # a path listed twice brings the same copy twice
            seen.add(canonical(name))
            _collect(found, distribution, name, version, summary)
    _refuse_shared_names(found)
    return found


def canonical(name: str) -> str:
    """One spelling of a name, as package indexes have it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _entry_point_text(distribution: metadata.Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):  # some other project's broken install; not for Folo to report
        return ""


def _identity(distribution: metadata.Distribution) -> tuple[str, str, str]:
    try:
        fields = distribution.metadata
        return fields["Name"] or "?", fields["Version"] or "?", fields["Summary"] or ""
    except Exception:  # noqa: BLE001 (a folder without METADATA raises differently in each Python)
        return "?", "?", ""


def _location(distribution: metadata.Distribution) -> str:
    return str(Path(str(distribution.locate_file(""))).resolve())


def _first_on_path(name: str) -> tuple[str, str] | None:
    try:
        first = metadata.distribution(name)
        return _identity(first)[1], _location(first)
    except metadata.PackageNotFoundError:
        return None


def _collect(found: Discovery, distribution: metadata.Distribution, name: str, version: str, summary: str) -> None:
    try:
        entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
    except Exception as error:  # noqa: BLE001 (whatever a malformed file provokes)
        text = f"its entry_points.txt cannot be read: {error}"
        found.broken.append(
            BrokenPlugin(name=name, distribution=name, version=version, problem="name", error=text, cause=error)
        )
        return
    for entry in entries:
        if re.match(NAME_PATTERN, entry.name):
            found.sources.append(
                Source(name=entry.name, distribution=name, version=version, summary=summary, load=entry.load)
            )
        else:
            text = f"entry point name {entry.name!r} must match {NAME_PATTERN}, so that PLUGIN:NAME can be told apart"
            found.broken.append(
                BrokenPlugin(name=entry.name, distribution=name, version=version, problem="name", error=text)
            )


def _refuse_shared_names(found: Discovery) -> None:
    """Two distributions with one plugin name: neither is taken, since any choice would hang on installation order."""
    counts = Counter(source.name for source in found.sources)
    for source in sorted(found.sources, key=lambda s: (s.name, s.distribution)):
        if counts[source.name] > 1:
            owners = sorted(s.distribution for s in found.sources if s.name == source.name)
            text = f"distributions {' and '.join(owners)} both name a plugin {source.name!r}: uninstall or block one"
            found.broken.append(
                BrokenPlugin(
                    name=source.name,
                    distribution=source.distribution,
                    version=source.version,
                    problem="name",
                    error=text,
                )
            )
    found.sources = sorted((s for s in found.sources if counts[s.name] == 1), key=lambda s: s.name)
