"""Rules that judge the fields of configs and parameters, so that every problem is reported at once.

A field carries its rule as metadata (``attrs.field(default=1, metadata=integer(low=1))``); rules that need several
fields are ``Relation``s of the class. A converter only normalises what it understands and passes anything else on
unchanged: judging is the rule's work, because a converter that raised would hide the problems of later fields.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Mapping
from functools import cache
from itertools import compress
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import attrs

from folo_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Rule = Callable[[Any], str | None]
"""Returns None when the value is fine, else the mend (``must be an integer >= 1``)."""

Data: TypeAlias = Any
"""A value whose type is not known yet: plain JSON-like data, or what a converter has made of it."""

K = TypeVar("K")
V_co = TypeVar("V_co", covariant=True)

INT64_MAX = 2**63 - 1
_RULE = "folo_rule"
INTERNAL = {"folo_internal": True}
"""Metadata of a field that the engine fills in: no mapping gives it, and it is neither written nor shown."""
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class FrozenMap(Mapping[K, V_co]):
    """An immutable mapping with private storage, equal to any mapping with the same items."""

    __slots__ = ("_items",)
    _items: dict[K, V_co]

    def __init__(self, items: Mapping[K, V_co] | None = None) -> None:
        object.__setattr__(self, "_items", dict(items or {}))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: {show(value)}: a FrozenMap cannot change; build a new one")

    def __getitem__(self, key: K) -> V_co:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)


@attrs.frozen
class Rejected:
    """Stands in for a value that could not be built, until its problems are reported with all others.

    A line's path is relative to the value; a line about the value itself begins with a colon.
    """

    problems: list[str]


class Relation(NamedTuple):
    """A rule over several fields; asked only when each of them is fine by itself."""

    fields: tuple[str, ...]
    judge: Callable[[Any], str | None]
    """Gets the whole object and returns None or a full problem line (``path: value: mend``)."""


class Checked:
    """Base of attrs classes that report all problems of their fields in one error, at construction.

    A subclass extends ``check``, not ``__attrs_post_init__``.
    """

    __slots__ = ()
    ERROR: ClassVar[type[Exception]] = ConfigError
    """What is raised with the list of problems."""
    RELATIONS: ClassVar[tuple[Relation, ...]] = ()

    def __attrs_post_init__(self) -> None:
        try:
            problems = self.check()
        except Exception:
            # A subclass's own check may trip over a field of the wrong type: the field's problem is the cause.
            problems = problems_of(self)
            if not problems:
                raise
        if problems:
            raise self.ERROR(problems)

    def __repr__(self) -> str:
        plan = _plan(type(self))  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
        given = zip(plan.names, plan.values(self), plan.defaults, strict=False)
        fields = ", ".join(f"{name}={value!r}" for name, value, usual in given if value != usual)
        return f"{type(self).__name__}({fields})"

    def check(self) -> list[str]:
        """Every problem of this object, one line each; a subclass extends ``super().check()``."""
        return problems_of(self)


class _Plan(NamedTuple):
    values: Callable[[Any], tuple[Any, ...]]
    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    rules: tuple[Rule | None, ...]
    relations: tuple[Relation, ...]


@cache
def _plan(cls: type) -> _Plan:
    """What ``problems_of`` needs to know about a class, worked out once."""
    fields = given_fields(cls)
    # A lone attrgetter returns no tuple, so the class is read as well, and dropped by zip.
    getter = attrgetter(*[field.name for field in fields], "__class__", "__class__")
    names = tuple(field.alias or field.name for field in fields)
    defaults = tuple(map(default_of, fields))
    return _Plan(getter, names, defaults, tuple(map(rule_of, fields)), getattr(cls, "RELATIONS", ()))


def problems_of(instance: object) -> list[str]:
    """Every problem of an attrs object's fields and relations, one line each (``path: value: mend``)."""
    plan = _plan(type(instance))  # type: ignore[arg-type]  # likewise
    values = plan.values(instance)
    problems: list[str] = []
    bad: set[str] = set()
    # Most fields keep their defaults, which are fine: they are passed over without a Python-level step.
    given = compress(zip(plan.names, values, plan.rules, strict=False), map(is_not, values, plan.defaults))
    for name, value, rule in given:
        if found := _judge(name, value, rule):
            bad.add(name)
            problems += found
    for fields, judge in plan.relations:
        if bad.isdisjoint(fields) and (line := judge(instance)) is not None:
            problems.append(line)
    return problems


def _judge(name: str, value: object, rule: Rule | None) -> list[str]:
    if type(value) is Rejected:
        return [under(name, line) for line in value.problems]
    mend = rule(value) if rule is not None else None
    return [] if mend is None else [f"{name}: {show(value)}: {mend}"]


def under(name: str, line: str) -> str:
    """A problem line of a nested value with its parent's name before its path."""
    return f"{name}{line}" if line.startswith((":", "[")) else f"{name}.{line}"


def given_fields(cls: type) -> list[attrs.Attribute[Any]]:
    """The fields that whoever builds the object gives: neither computed nor the engine's own."""
    return [field for field in attrs.fields(cls) if field.init and "folo_internal" not in field.metadata]


def rule_of(field: attrs.Attribute[Any]) -> Rule | None:
    """The rule that a field carries, or None."""
    found: Rule | None = field.metadata.get(_RULE)
    return found


def default_of(field: attrs.Attribute[Any]) -> Data:
    """What a field is when it is not given: its factory's product, or attrs.NOTHING if it must be given."""
    default: Any = field.default
    return default.factory() if isinstance(default, attrs.Factory) and not default.takes_self else default  # type: ignore[arg-type]


def show(value: object) -> str:
    """A short repr of any value, for error messages; never raises, never long."""
    try:
        return _repr.repr(value)
    except Exception:  # noqa: BLE001 (a repr may fail in any way, and the message must still be written)
        return f"<{type(value).__name__}>"


# --- rules ---------------------------------------------------------------------------------------------------------


def rule(fine: Callable[[Any], bool], mend: str, *, optional: bool = False) -> dict[str, Rule]:
    """Metadata for a field whose value is ``fine``, or None if ``optional``; ``mend`` says what it must be."""
    mend = f"{mend} or None" if optional else mend

    def judge(value: object) -> str | None:
        return None if (value is None and optional) or fine(value) else mend

    return {_RULE: judge}


def integer(*, low: int | None = None, high: int | None = None, optional: bool = False) -> dict[str, Rule]:
    """Metadata for an integer within inclusive bounds; a bool is no integer."""

    def fine(value: object) -> bool:
        return type(value) is int and (low is None or value >= low) and (high is None or value <= high)

    return rule(fine, f"must be an integer{_span(low, high)}", optional=optional)


def number(*, low: float | None = None, high: float | None = None, above: float | None = None) -> dict[str, Rule]:
    """Metadata for a finite float within inclusive bounds, or greater than ``above``."""
    least, most, floor = (-math.inf if low is None else low), (math.inf if high is None else high), above

    def fine(value: object) -> bool:
        if type(value) is not float or not math.isfinite(value):
            return False
        return least <= value <= most and (floor is None or value > floor)

    return rule(fine, f"must be a finite number{_span(low, high, above)}")


def boolean(*, optional: bool = False) -> dict[str, Rule]:
    """Metadata for True or False, and nothing that merely looks like it."""
    return rule(lambda value: type(value) is bool, "must be true or false", optional=optional)


def text(*, optional: bool = False, pattern: str = r"[^\0]+", mend: str = "must be non-empty text") -> dict[str, Rule]:
    """Metadata for non-empty text that UTF-8 can encode and that matches a whole ``pattern``."""
    matches = re.compile(pattern).fullmatch
    return rule(lambda value: is_text(value) and bool(matches(value)), mend, optional=optional)


def one_of(*choices: str, optional: bool = False) -> dict[str, Rule]:
    """Metadata for one of a few words, or None if ``optional``; the mend names the word that text comes close to."""
    mend = f"must be one of {', '.join(choices)}" + (" or None" if optional else "")

    def judge(value: object) -> str | None:
        if not isinstance(value, str):
            return None if value is None and optional else mend
        if value in choices:
            return None
        close = difflib.get_close_matches(value, choices, n=1)
        return f"{mend}; did you mean {close[0]!r}?" if close else mend

    return {_RULE: judge}


def _span(low: float | None, high: float | None, above: float | None = None) -> str:
    if above is not None:
        return f" > {above:g}" + ("" if high is None else f" and <= {high:g}")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" >= {low}" if low is not None else f" <= {high}" if high is not None else ""


# --- converters and predicates ---------------------------------------------------------------------------------------


def are_token_ids(values: object) -> bool:
    """Whether this is a tuple of what could be token ids. It may be long, so no loop runs in Python."""
    if type(values) is not tuple or not set(map(type, values)) <= {int}:
        return False
    return min(values, default=0) >= 0 and max(values, default=0) <= INT64_MAX


def are_texts(values: object) -> bool:
    """Whether this is a tuple whose every item ``is_text``."""
    return type(values) is tuple and all(map(is_text, values))


def is_text(value: object) -> bool:
    """Whether the value is non-empty text that UTF-8 can encode (a lone surrogate cannot be)."""
    if type(value) is not str or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_int(value: int) -> int:
    """Plain int from any integral number (numpy's too); anything else unchanged."""
    if type(value) is int or isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return value
    return int(value)


def as_optional_int(value: int | None) -> int | None:
    """Like ``as_int``, with None for None."""
    return None if value is None else as_int(value)


def as_float(value: float) -> float:
    """Plain float from any real number; anything else, and what a float cannot hold, unchanged."""
    if type(value) is float or isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        return float(value)
    except OverflowError:
        return value
