"""Builds attrs classes from mappings with cattrs, and reports every bad field at once with its path."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import attrs

from folo_core.errors import ConfigError, ParamsError
from folo_core.validation import Checked, FrozenMap, Rejected, default_of, given_fields, rule_of, show, under

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cattrs import Converter

    from folo_core.validation import Data

T = TypeVar("T")

MAX_DEPTH = 32
"""Deepest nesting of untyped data."""

HINTS: dict[object, str] = {
    "trust_remote_code": "Folo runs no code from a model's folder; choose an architecture of transformers",
    "gpu_memory_fraction": "the version 1 name of cache.gpu_memory_utilization; give that one alone",
}
"""Mends for names that are not fields but that people try."""


def as_section(cls: type[T], value: object) -> T:
    """A section given as itself or as a mapping; a mapping's problems are kept for the whole config's report."""
    if not isinstance(value, Mapping):
        return cast("T", value)
    try:
        return structure(cls, value)
    except ConfigError as error:
        return cast("T", Rejected(error.problems))


def structure(cls: type[T], value: object) -> T:
    """Build ``cls``, an attrs class of Folo's or a plugin's, from a mapping as JSON or TOML gives it.

    Raises:
        ConfigError: (or the class's own ``ERROR``) one ``path: value: mend`` line for every bad or unknown field.
    """
    try:
        return _converter().structure(value, cls)
    except (ConfigError, ParamsError) as error:
        raise type(error)([under(cls.__name__, x) if x.startswith(":") else x for x in error.problems]) from None


def unstructure(value: object) -> Data:
    """Plain dicts, lists and scalars of a config, a section or SamplingParams."""
    return _converter().unstructure(value)


def describe_fields(cls: type, path: str = "") -> list[dict[str, Any]]:
    """One row for every field of a config class and of the sections in it: its path, default and what it accepts."""
    rows: list[dict[str, Any]] = []
    for name, field in fields_of(cls).items():
        if isinstance(field.type, type) and attrs.has(field.type):
            rows += describe_fields(field.type, f"{path}{name}.")
            continue
        required = field.default is attrs.NOTHING
        default = None if required else unstructure(default_of(field))
        rows.append({"field": path + name, "default": default, "required": required, "accepts": _mend_of(field)})
    return rows


def parse_text(value: str, kind: Data) -> Data:
    """What an environment variable's text means for a field of this type; the text itself if it means nothing."""
    with contextlib.suppress(Exception):  # whatever goes wrong, the field's own rule judges the text
        return _text_converter().structure(value, kind)
    return value


def suggest(name: object, known: Iterable[str]) -> str:
    """A mend for an unknown name: the closest known one, or all of them."""
    if name in HINTS:
        return HINTS[name]
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"unknown; did you mean {close[0]!r}?" if close else f"unknown; known are {', '.join(names) or 'none'}"


def freeze(value: Data, depth: int = MAX_DEPTH) -> Data:
    """An immutable copy of JSON-like data: FrozenMap for mappings, tuples for lists; what lies deeper stays."""
    if isinstance(value, Mapping) and depth:
        return FrozenMap({key: freeze(item, depth - 1) for key, item in value.items()})
    return tuple(freeze(item, depth - 1) for item in value) if isinstance(value, (list, tuple)) and depth else value


def fields_of(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields that a mapping may give, by the name it uses, with their annotations resolved."""
    try:
        attrs.resolve_types(cls)
    except NameError as error:
        mend = "import what its annotations name at run time, not for type checkers alone"
        raise ConfigError(f"{cls.__name__}: {error}: {mend}") from error
    return {field.alias or field.name: field for field in given_fields(cls)}


@cache
def _converter() -> Converter:
    """The cattrs converter for files. Importing cattrs costs 30 ms that ready-made configs never need."""
    from cattrs import Converter

    made = Converter()
    made.register_structure_hook_factory(attrs.has, lambda cls: lambda value, _: _structure_fields(made, cls, value))
    for kind, accepted in {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.items():
        made.register_structure_hook(kind, _strict(kind, accepted))
    made.register_unstructure_hook_func(
        attrs.has,
        lambda value: {k: made.unstructure(getattr(value, f.name)) for k, f in fields_of(type(value)).items()},
    )
    made.register_unstructure_hook(FrozenMap, lambda value: {key: made.unstructure(x) for key, x in value.items()})
    for sequence in (tuple, list, set, frozenset):
        made.register_unstructure_hook(sequence, lambda value: [made.unstructure(item) for item in value])
    made.register_unstructure_hook(Enum, lambda value: value.value)
    made.register_unstructure_hook(PurePath, str)
    return made


def _strict(kind: Data, accepted: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """A hook that takes only these types, where cattrs would take whatever ``kind(value)`` takes."""

    def hook(value: Data, _: Data) -> Data:
        if type(value) not in accepted:
            raise TypeError(f"{show(value)} is no {kind.__name__}")
        return kind(value)

    return hook


def _structure_fields(made: Converter, cls: type, value: object) -> Data:
    """Every field by its type, then the object; all problems in one error."""
    error = getattr(cls, "ERROR", ConfigError)
    if isinstance(value, cls):
        return value
    fields = fields_of(cls)
    if not isinstance(value, Mapping):
        raise error(f": {show(value)}: must be a table with the fields {', '.join(fields)}")
    problems = [f"{name}: {show(item)}: {suggest(name, fields)}" for name, item in value.items() if name not in fields]
    given = {
        name: _structure_one(made, field, value[name]) if name in value else Rejected([f": missing: {_mend_of(field)}"])
        for name, field in fields.items()
        if name in value or field.default is attrs.NOTHING
    }
    if not issubclass(cls, Checked):
        problems += _judge_plain(fields, given)
    built = None
    if not problems or issubclass(cls, Checked):
        built, found = _build(cls, given)
        problems += found
    if problems:
        raise error(problems)
    return built


def _structure_one(made: Converter, field: attrs.Attribute[Any], value: Data) -> Data:
    if rule_of(field) is not None or field.type is None:
        return value
    try:
        return made.structure(value, field.type)
    except (ConfigError, ParamsError) as error:
        return Rejected(error.problems)
    except Exception:  # noqa: BLE001 (a plugin's own hooks may raise anything; it is the value that does not fit)
        return Rejected([f": {show(value)}: must be {_type_name(field.type)}"])


def _judge_plain(fields: Mapping[str, attrs.Attribute[Any]], given: Mapping[str, Any]) -> list[str]:
    """Problems of a plain attrs class, whose own constructor would stop at the first."""
    problems: list[str] = []
    for name, value in given.items():
        if isinstance(value, Rejected):
            problems += [under(name, line) for line in value.problems]
        elif (validator := fields[name].validator) is not None and fields[name].converter is None:
            try:
                validator(None, fields[name], value)
            except (TypeError, ValueError) as error:
                problems.append(f"{name}: {show(value)}: {error.args[0] if error.args else error}")
            except Exception:  # noqa: BLE001, S110 (a validator that needs the object: the constructor will run it)
                pass
    return problems


def _build(cls: type, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    try:
        return cls(**given), []
    except (ConfigError, ParamsError) as error:
        return None, error.problems
    except (TypeError, ValueError) as error:
        return None, [f": {show(dict(given))}: {error}"]


def _mend_of(field: attrs.Attribute[Any]) -> str:
    rule = rule_of(field)
    return (rule(attrs.NOTHING) if rule else None) or f"must be {_type_name(field.type)}"


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


@cache
def _text_converter() -> Converter:
    """The cattrs converter for leaves given as text; a leaf that does not parse stays text."""
    from cattrs import Converter

    made = Converter()
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    made.register_structure_hook(bool, lambda text, _: words.get(text.strip().lower(), text))
    made.register_structure_hook_func(
        lambda kind: _origin(kind) is tuple, lambda text, kind: _text_items(made, text, kind)
    )
    made.register_structure_hook_func(_is_mapping, lambda text, _: json.loads(text))
    return made


def _is_mapping(kind: object) -> bool:
    origin = _origin(kind)
    return kind is Any or (isinstance(origin, type) and (attrs.has(origin) or issubclass(origin, Mapping)))


def _origin(kind: Data) -> object:
    return getattr(kind, "__origin__", kind)


def _text_items(made: Converter, text: str, kind: Data) -> Data:
    """``a,b`` or a JSON list."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    items = [item.strip() for item in text.split(",") if item.strip()]
    return [made.structure(item, get_args(kind)[0]) for item in items]
