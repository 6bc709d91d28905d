"""Lifts old configuration tables to the version that this folo-core understands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from folo_core.errors import ConfigError
from folo_core.validation import show

CURRENT_VERSION = 2
"""Version of the tables that this folo-core reads and writes. A file without ``config_version`` is of this version."""

Tables = dict[str, Any]
Migration = Callable[[Mapping[str, Any]], Tables]


def migrate(tables: Mapping[str, Any]) -> Tables:
    """A copy of the tables in the current version.

    Raises:
        ConfigError: the version is unknown, or an old name stands beside the new one.
    """
    lifted = lift(tables, CURRENT_VERSION, MIGRATIONS.get, owner="folo-core")
    return lifted | {"config_version": CURRENT_VERSION}


def lift(tables: Mapping[str, Any], current: int, step: Callable[[int], Migration | None], *, owner: str) -> Tables:
    """Apply one migration after another to a copy of ``tables``, without its ``config_version``.

    Raises:
        ConfigError: the version is no version, is newer than ``current``, or a step is missing.
    """
    version = tables.get("config_version", current)
    if type(version) is not int or version < 1:
        raise ConfigError(f"config_version: {show(version)}: must be an integer from 1 to {current}")
    if version > current:
        raise ConfigError(f"config_version: {version}: newer than {owner} understands ({current}); upgrade {owner}")
    lifted = {key: value for key, value in tables.items() if key != "config_version"}
    for old in range(version, current):
        migration = step(old)
        if migration is None:
            raise ConfigError(f"config_version: {old}: {owner} has no migration from it; write version {current}")
        lifted = dict(migration(lifted))
    return lifted


def _from_1(tables: Mapping[str, Any]) -> Tables:
    """Version 1 had ``gpu_memory_fraction`` outside any table; it is ``cache.gpu_memory_utilization`` now."""
    cache = tables.get("cache", {})
    if "gpu_memory_fraction" not in tables or not isinstance(cache, Mapping) or "gpu_memory_utilization" in cache:
        return dict(tables)  # nothing to do, or what is left will be reported with every other problem
    lifted = {name: value for name, value in tables.items() if name != "gpu_memory_fraction"}
    return lifted | {"cache": {**cache, "gpu_memory_utilization": tables["gpu_memory_fraction"]}}


MIGRATIONS: dict[int, Migration] = {1: _from_1}
"""From each old version to the next."""
