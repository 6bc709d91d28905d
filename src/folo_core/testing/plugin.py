"""pytest plugin, loaded by pytest itself wherever folo-core is installed; so it imports nothing heavy at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from folo_core.plugins.registry import Registry


@pytest.fixture(scope="session")
def folo_registry() -> Registry:
    """All installed plugins, loaded once per test session."""
    from folo_core.plugins.manager import load_registry

    return load_registry()
