"""Reads configs from JSON, TOML, environment variables and flat options, one layered on another, and writes them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from folo_core.config.engine import SECTIONS, EngineConfig, build, tables_of_options, typed_sections
from folo_core.config.migrations import migrate
from folo_core.config.sections import fields_of, parse_text, unstructure
from folo_core.errors import ConfigError
from folo_core.validation import FrozenMap, show

if TYPE_CHECKING:
    from folo_core.config.migrations import Migration
    from folo_core.validation import Data

ENV_PREFIX = "FOLO_"
MAX_FILE_BYTES = 1 << 20
"""A longer file is no configuration: it is refused before it is parsed."""


def load(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    sections: Mapping[str, type] | None = None,
    migrations: Mapping[tuple[str, int], Migration] | None = None,
) -> EngineConfig:
    """Build an EngineConfig from layers; a later one wins, field by field: ``source``, ``env``, ``options``.

    Args:
        source: a ``.toml`` or ``.json`` file, or its tables as a mapping. Old versions are migrated.
        env: environment variables such as ``FOLO_CACHE__BLOCK_SIZE=32``; pass ``os.environ`` to read the process's.
        options: flat keywords as for ``EngineConfig.from_options``.
        sections: plugin section name to attrs class. Without it plugin sections stay plain tables.
        migrations: as for ``EngineConfig.with_sections``.

    Raises:
        ConfigError: one ``path: value: mend`` line for every problem, or the reason why the file cannot be read.
    """
    tables = migrate(_read(source))
    problems: list[str] = []
    if env is not None:
        tables = _merge(tables, tables_of_env(env, sections or {}))
    if options is not None:
        flat, problems = tables_of_options(options)
        tables = _merge(tables, flat)
    plugins = tables.get("plugins", {})
    if sections is not None and isinstance(plugins, Mapping):
        tables["plugins"], found = typed_sections(plugins, sections, migrations or {})
        problems += found
    return build(tables, problems)


def dumps_json(config: EngineConfig) -> str:
    """The config as JSON text, every field included."""
    return json.dumps(_tables(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dumps_toml(config: EngineConfig) -> str:
    """The config as TOML text; a field that is None is left out, which reads back as None.

    Raises:
        ConfigError: a None that leaving out would not bring back (TOML has no null).
    """
    import tomli_w

    problems: list[str] = []
    tables = _without_none(_tables(config), config, "", problems)
    if problems:
        raise ConfigError(problems)
    return tomli_w.dumps(tables)


def dumps_env(config: EngineConfig) -> dict[str, str]:
    """The config as environment variables that ``load(env=...)`` reads back; None is left out."""
    tables = _tables(config)
    nested = {(s, f): value for s in SECTIONS for f, value in tables.pop(s).items()}
    leaves = {(name,): value for name, value in tables.items()} | nested
    return {
        ENV_PREFIX + "__".join(path).upper(): value if isinstance(value, str) else json.dumps(value)
        for path, value in leaves.items()
        if value is not None
    }


def tables_of_env(env: Mapping[str, str], sections: Mapping[str, type]) -> dict[str, Any]:
    """Nested tables of the variables that are configuration, each leaf read by its field's type.

    ``FOLO_A__B`` is always configuration; ``FOLO_A`` only where ``a`` is a field, because other parts of Folo
    have variables of their own. An empty variable counts as unset.
    """
    tables: dict[str, Any] = {}
    top = fields_of(EngineConfig).keys() - (SECTIONS.keys() - {"model"})
    # Shorter names first: FOLO_EXTRA_CONFIG as a whole, then FOLO_EXTRA_CONFIG__KEY within it.
    for variable in sorted(env, key=lambda name: (name.count("__"), name)):
        path = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if not variable.startswith(ENV_PREFIX) or not env[variable] or (len(path) == 1 and path[0] not in top):
            continue
        path, kind = _resolve(path, sections)
        table = tables
        for name in path[:-1]:
            inner = table.get(name)
            table[name] = table = dict(inner) if isinstance(inner, Mapping) else {}
        table[path[-1]] = parse_text(env[variable], kind)
    return tables


def _resolve(path: list[str], sections: Mapping[str, type]) -> tuple[list[str], Any]:
    """The path with a plugin section's real name (a variable cannot hold ``-`` or ``.``), and its field's type."""
    cls: type | None = EngineConfig
    if path == ["model"]:
        return ["model", "model"], str
    if path[0] == "plugins" and len(path) > 1:
        names = {re.sub(r"[-.]", "_", name).lower(): name for name in sections}
        path = ["plugins", names.get(path[1], path[1]), *path[2:]]
        cls, rest = sections.get(path[1]), path[2:]
    elif path[0] in SECTIONS:
        cls, rest = SECTIONS[path[0]], path[1:]
    else:
        rest = path
    fields = fields_of(cls) if cls is not None else {}
    return path, fields[rest[0]].type if len(rest) == 1 and rest[0] in fields else Any


def _read(source: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if source is None or isinstance(source, Mapping):
        return source or {}
    path = Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}: give a readable .toml or .json file") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: more than {MAX_FILE_BYTES} bytes: too long for a configuration file")
    try:
        tables = _parse(path, data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path}: {reason}: mend the file's syntax (UTF-8 {path.suffix[1:].upper()})") from error
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{path}: {show(tables)}: must be a table of sections such as {', '.join(SECTIONS)}")
    return tables


def _parse(path: Path, text: str) -> Data:
    if path.suffix.lower() == ".toml":
        return tomllib.loads(text)
    if path.suffix.lower() == ".json":
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    raise ConfigError(f"{path}: {path.suffix or 'no suffix'}: name the file .toml or .json, after what it holds")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key come twice and the last one win; a configuration in which that happens is a mistake."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"given twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of both, field by field, where ``high`` wins."""
    merged = dict(low)
    for name, value in high.items():
        old = merged.get(name)
        if name == "model" and isinstance(old, str) and isinstance(value, Mapping):
            old = {"model": old}
        merged[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _tables(config: EngineConfig) -> dict[str, Any]:
    """Plain tables of a config; a plugin section beyond version 1 says its version."""
    tables: dict[str, Any] = unstructure(config)
    for name, section in config.plugins.items():
        if (version := getattr(section, "CONFIG_VERSION", 1)) > 1:
            tables["plugins"][name] = {"config_version": version} | tables["plugins"][name]
    return tables


def _without_none(value: Data, source: Data, path: str, problems: list[str]) -> Data:
    """``value`` without the None of fields whose default is None; any other None is a problem."""
    if isinstance(value, dict):
        fields = fields_of(type(source)) if attrs.has(type(source)) else {}
        kept = {}
        for name, item in value.items():
            if item is None and name in fields and fields[name].default is None:
                continue
            inner = getattr(source, fields[name].name) if name in fields else _item(source, name)
            kept[name] = _without_none(item, inner, f"{path}.{name}".lstrip("."), problems)
        return kept
    if isinstance(value, list):
        return [_without_none(item, None, f"{path}[{index}]", problems) for index, item in enumerate(value)]
    if value is None:
        problems.append(f"{path}: None: TOML has no null; leave it out, or write JSON")
    return value


def _item(source: Data, name: str) -> Data:
    return source.get(name) if isinstance(source, FrozenMap) else None
