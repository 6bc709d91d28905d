"""Where every suite of the conformance kit starts from: a part of an installed plugin."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import pytest

from folo_core.plugins.manager import load_registry
from folo_core.testing.harness import require

if TYPE_CHECKING:
    from folo_core.plugins.registry import Part, Registry


@functools.cache
def load_with(plugin: str) -> Registry:
    """All installed plugins, with this one loaded even where autoload is off.

    Raises:
        AssertionError: it is broken or not installed.
    """
    registry = load_registry(extra=[plugin])
    problems = [str(broken) for broken in registry.broken if broken.name == plugin]
    require(not problems, "\n".join(problems))
    names = [loaded.name for loaded in registry.plugins]
    require(plugin in names, f"plugin {plugin!r} is not installed; installed: {', '.join(names)}")
    return registry


class Installed:
    """What every check starts from: the plugin as it is installed."""

    plugin: ClassVar[str]
    """The entry point's name."""

    @pytest.fixture(name="registry")
    def registry_fixture(self) -> Registry:
        """All installed plugins."""
        return load_with(self.plugin)


class PartConformance(Installed):
    """A suite for one part of a plugin."""

    kind: ClassVar[str]
    name: ClassVar[str]
    """The part's bare name."""
    vocab_size: ClassVar[int] = 37

    @pytest.fixture(name="part")
    def part_fixture(self) -> Part:
        """The part under test."""
        return self.find()

    def find(self) -> Part:
        """The part under test."""
        return load_with(self.plugin).get(self.kind, f"{self.plugin}:{self.name}")
