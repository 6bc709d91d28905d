"""Builds attrs classes from mappings with cattrs, and reports every bad field at once with its path."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin

import attrs

from folo_core.errors import ConfigError, ParamsError
from folo_core.validation import Checked, FrozenMap, Rejected, rule_of, show, under

if TYPE_CHECKING:
    from collections.abc import Callable

    from cattrs import Converter

T = TypeVar("T")

HINTS = {
    "trust_remote_code": "Folo never runs code from a model's folder; use an architecture that transformers has",
    "gpu_memory_fraction": "is a name of version 1; use cache.gpu_memory_utilization, or say config_version = 1",
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


def unstructure(value: object) -> Any:
    """Plain dicts, lists and scalars of a config, a section or SamplingParams."""
    return _converter().unstructure(value)


def parse_text(value: str, kind: Any) -> Any:
    """What an environment variable's text means for a field of this type; the text itself if it means nothing."""
    with contextlib.suppress(Exception):  # whatever goes wrong, the field's own rule judges the text
        return _text_converter().structure(value, kind)
    return value


def suggest(name: object, known: Iterable[str]) -> str:
    """A mend for an unknown name: the closest known one, or all of them."""
    if name in HINTS:
        return HINTS[cast("str", name)]
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"unknown; did you mean {close[0]!r}?" if close else f"unknown; known: {', '.join(names) or 'none'}"


def freeze(value: Any) -> Any:
    """An immutable copy of JSON-like data: FrozenMap for mappings, tuples for lists."""
    if isinstance(value, Mapping):
        return FrozenMap({key: freeze(item) for key, item in value.items()})
    return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value


def fields_of(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields that a mapping may give, by the name it uses, with their annotations resolved."""
    with contextlib.suppress(NameError):  # a name imported for type checkers only: the field is taken as it comes
        attrs.resolve_types(cls)
    return {field.alias or field.name: field for field in attrs.fields(cls) if field.init}


@cache
def _converter() -> Converter:
    """The cattrs converter for files. Importing cattrs costs 30 ms that ready-made configs never need."""
    from cattrs import Converter  # noqa: PLC0415

    made = Converter()
    made.register_structure_hook_factory(attrs.has, lambda cls: lambda value, _: _structure_fields(made, cls, value))
    for kind, accepted in {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.items():
        made.register_structure_hook(kind, _strict(kind, accepted))
    made.register_unstructure_hook_func(
        lambda kind: attrs.has(kind),
        lambda value: {k: made.unstructure(getattr(value, f.name)) for k, f in fields_of(type(value)).items()},
    )
    made.register_unstructure_hook(FrozenMap, lambda value: {key: made.unstructure(x) for key, x in value.items()})
    for sequence in (tuple, list, set, frozenset):
        made.register_unstructure_hook(sequence, lambda value: [made.unstructure(item) for item in value])
    made.register_unstructure_hook(Enum, lambda value: value.value)
    made.register_unstructure_hook(PurePath, str)
    return made


def _strict(kind: Any, accepted: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) not in accepted:
            raise TypeError(f"{show(value)} is no {kind.__name__}")
        return kind(value)

    return hook


def _structure_fields(made: Converter, cls: type, value: object) -> Any:
    """Every field by its type, then the object; all problems in one error."""
    error = getattr(cls, "ERROR", ConfigError)
    if isinstance(value, cls):
        return value
    fields = fields_of(cls)
    if not isinstance(value, Mapping):
        raise error(f": {show(value)}: must be a table with the fields {', '.join(fields)}")
    problems = [f"{name}: {show(item)}: {suggest(name, fields)}" for name, item in value.items() if name not in fields]
    given = {name: _structure_one(made, field, value[name]) for name, field in fields.items() if name in value}
    given |= {
        name: Rejected([f": missing: {_mend_of(field)}"])
        for name, field in fields.items()
        if name not in value and field.default is attrs.NOTHING
    }
    if not issubclass(cls, Checked):
        problems += _judge_plain(fields, given)
    if not problems or issubclass(cls, Checked):
        built, found = _build(cls, given)
        problems += found
    if problems:
        raise error(problems)
    return built


def _structure_one(made: Converter, field: attrs.Attribute[Any], value: Any) -> Any:
    if rule_of(field) is not None or isinstance(field.type, str):
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
    return (rule(attrs.NOTHING) if rule else None) or f"give {_type_name(field.type)}"


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


@cache
def _text_converter() -> Converter:
    """The cattrs converter for leaves given as text; a leaf that does not parse stays text."""
    from cattrs import Converter  # noqa: PLC0415

    made = Converter()
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    made.register_structure_hook(bool, lambda text, _: words.get(text.strip().lower(), text))
    made.register_structure_hook_func(
        lambda kind: get_origin(kind) in {tuple, list}, lambda text, kind: _text_items(made, text, kind)
    )
    made.register_structure_hook_func(_is_mapping, lambda text, _: json.loads(text))
    return made


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return kind is Any or attrs.has(origin) or (isinstance(origin, type) and issubclass(origin, Mapping))


def _text_items(made: Converter, text: str, kind: Any) -> Any:
    """``a,b`` or a JSON list."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    items = [item.strip() for item in text.split(",") if item.strip()]
    return [made.structure(item, get_args(kind)[0]) for item in items]
