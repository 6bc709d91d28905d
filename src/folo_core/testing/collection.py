"""Makes pytest items of the conformance kit's suites, for ``pytest --folo-conformance``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from folo_core.plugins.registry import hook_kinds
from folo_core.testing.conformance import SUITES, PluginConformance
from folo_core.testing.harness import ConformanceError
from folo_core.testing.installed import PartConformance, load_with

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from folo_core.plugins.registry import Part
    from folo_core.testing.installed import Installed

_PREFIX = "test_"


def collect_suites(session: pytest.Session, names: Iterable[str]) -> list[Suite]:
    """One collector per plugin named, and one per part.

    Raises:
        pytest.UsageError: a plugin is not installed or broken, or has no such part.
    """
    suites: dict[str, Suite] = {}
    for name in names:
        plugin, _, part = name.partition(":")
        for title, suite in _suites_of(plugin, part):
            if title not in suites:
                suites[title] = Suite.from_parent(session, name=title, nodeid=title, suite=suite)
    return list(suites.values())


class Suite(pytest.Collector):
    """A suite for one plugin or part."""

    def __init__(self, suite: type[Installed], **fields: Any) -> None:  # noqa: ANN401 (pytest's own)
        super().__init__(**fields)
        self.suite = suite

    def collect(self) -> Iterator[Check]:
        """Return an item for each check, in the order of the source."""
        for name in checks_of(self.suite):
            title = name.removeprefix(_PREFIX).replace("_", " ")
            yield Check.from_parent(self, name=title, suite=self.suite, method=name)


class Check(pytest.Item):
    """One check."""

    def __init__(self, suite: type[Installed], method: str, **fields: Any) -> None:  # noqa: ANN401 (pytest's own)
        super().__init__(**fields)
        self.suite, self.method = suite, method

    def runtest(self) -> None:
        """Run it, with what its signature asks for."""
        suite = self.suite()
        check = getattr(suite, self.method)
        wanted = inspect.signature(check).parameters
        given: dict[str, object] = {"registry": load_with(suite.plugin)} if "registry" in wanted else {}
        if isinstance(suite, PartConformance) and "part" in wanted:
            given["part"] = suite.find()
        check(**given)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:  # noqa: ANN401 (pytest's own)
        """Show what the kit found without the kit's own traceback; a plugin's exceptions come with theirs."""
        if isinstance(excinfo.value, ConformanceError):
            return f"{excinfo.value}\n\nWhat is checked: {inspect.getdoc(getattr(self.suite, self.method))}"
        excinfo.traceback = excinfo.traceback.cut(path=__file__)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Say what a report is headed with."""
        return self.path, None, self.nodeid


def checks_of(suite: type[Installed]) -> list[str]:
    """Names of a suite's checks, in the order of the source."""
    return [name for cls in reversed(suite.__mro__) for name in vars(cls) if name.startswith(_PREFIX)]


def _suites_of(plugin: str, name: str) -> list[tuple[str, type[Installed]]]:
    """Titles and suites: the plugin's own, and one for each part that is meant and can be judged."""
    try:
        registry = load_with(plugin)
    except AssertionError as error:
        raise pytest.UsageError(f"--folo-conformance {plugin}: {error}") from None
    parts = [part for kind in hook_kinds() for part in registry.all(kind) if part.plugin == plugin]
    chosen = [part for part in parts if name in {"", part.name}]
    if not chosen:
        known = ", ".join(part.qualified_name for part in parts) or "none"
        raise pytest.UsageError(f"--folo-conformance {plugin}:{name}: no such part; the plugin offers {known}")
    return [(plugin, type("Suite", (PluginConformance,), {"plugin": plugin})), *_of_parts(chosen)]


def _of_parts(parts: list[Part]) -> list[tuple[str, type[Installed]]]:
    return [
        (part.qualified_name, type("Suite", (SUITES[part.kind],), {"plugin": part.plugin, "name": part.name}))
        for part in parts
        if part.kind in SUITES
    ]
