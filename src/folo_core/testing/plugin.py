"""pytest plugin, loaded by pytest itself wherever folo-core is installed; so it imports nothing heavy at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from folo_core.plugins.registry import Registry

OPTION = "--folo-conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer ``--folo-conformance``."""
    parser.getgroup("folo").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="PLUGIN[:PART]",
        help="Run Folo's conformance kit on this installed plugin, or on one part of it; may be given often. "
        "The folder's own tests run as well only if a path is given.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With the option and no path, run the kit alone, in whatever folder."""
    if config.getoption(OPTION) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let the session collect the suites that the option names."""
    report = yield
    names = collector.config.getoption(OPTION)
    if names and isinstance(collector, pytest.Session) and report.passed:
        from folo_core.testing.collection import collect_suites

        report.result = [*report.result, *collect_suites(collector, names)]
    return report


@pytest.fixture(scope="session")
def folo_registry() -> Registry:
    """All installed plugins, loaded once per test session."""
    from folo_core.plugins.manager import load_registry

    return load_registry()
