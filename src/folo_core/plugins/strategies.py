"""Parameters for a decoding strategy that is chosen by its name, as a command line or a server receives them."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any

from folo_core.errors import ParamsError
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.validation import given_fields, show

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from folo_core.plugins.registry import Registry
    from folo_core.plugins.specs import SamplerSpec


def strategy_params(registry: Registry, strategy: str, fields: Mapping[str, Any]) -> SamplingParams:
    """Build the parameters that a strategy reads.

    Args:
        registry: what is installed.
        strategy: a sampler's bare or qualified name, such as ``beam`` or ``folo-beam:beam``.
        fields: values as JSON gives them, by the names of the strategy's params class.

    Raises:
        PluginError: no plugin offers the strategy, or several do.
        ParamsError: a field is unknown or its value is refused, or the fields ask for another strategy.
    """
    spec: SamplerSpec = registry.get("samplers", strategy).spec
    types = spec.sampling_types
    if types == {SamplingType.GREEDY}:
        fields = {"temperature": 0.0, **fields}
    params = make_params(spec.params_type, fields)
    if types and params.sampling_type not in types:
        served = " or ".join(sorted(kind.value for kind in types))
        message = f"strategy: {strategy!r}: serves {served} sampling, and these parameters ask for "
        mend = ": set n or best_of above 1" if SamplingType.FAN_OUT in types else ": leave the strategy out"
        raise ParamsError(f"{message}{params.sampling_type.value}{mend}")
    return params


def params_from_options(
    strategy: str | None,
    options: Iterable[str],
    flags: Mapping[str, Any],
    registry: Registry | None = None,
) -> SamplingParams:
    """Build parameters from what a command line gives; without a strategy, plain ones, greedy unless told otherwise.

    Args:
        strategy: a sampler's bare or qualified name, or None.
        options: ``FIELD=VALUE`` texts; they win over ``flags``.
        flags: fields that have options of their own; None stands for one that was not given.
        registry: what is installed; found out if None.

    Raises:
        PluginError: no plugin offers the strategy, or several do.
        ParamsError: a field is unknown or its value is refused.
    """
    fields = {name: value for name, value in flags.items() if value is not None} | parse_options(options)
    if strategy is None:
        return make_params(SamplingParams, {"temperature": 0.0, **fields})
    if registry is None:
        from folo_core.plugins.manager import load_registry

        registry = load_registry()
    return strategy_params(registry, strategy, fields)


def make_params(cls: type[SamplingParams], fields: Mapping[str, Any]) -> SamplingParams:
    """Build ``cls``; its own converters and rules judge the values.

    Raises:
        ParamsError: one line for every bad value; of names that it does not have, with the names that it has.
    """
    from folo_core.config import structure

    known = _field_names(cls)
    unknown = [
        f"{name}: {show(value)}: {_unknown(name, cls, known)}" for name, value in fields.items() if name not in known
    ]
    if unknown:
        raise ParamsError(unknown)
    return structure(cls, fields)


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Read ``FIELD=VALUE`` texts: a value that is JSON means that, any other is text. The last of equals holds.

    Raises:
        ParamsError: a text has no field or no equals sign.
    """
    pairs = [(option, *option.partition("=")) for option in options]
    bad = [
        f"option {option!r}: write FIELD=VALUE, such as n=4" for option, name, sign, _ in pairs if not name or not sign
    ]
    if bad:
        raise ParamsError(bad)
    return {name.strip(): _parse_value(value) for _, name, _, value in pairs}


def _parse_value(text: str) -> Any:  # noqa: ANN401 (any JSON value)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _field_names(cls: type[SamplingParams]) -> list[str]:
    """The names that a mapping may give, the class's own before those that every strategy has."""
    names = [field.alias or field.name for field in given_fields(cls)]
    common = {field.alias or field.name for field in given_fields(SamplingParams)}
    return sorted(names, key=common.__contains__)


def _unknown(name: str, cls: type, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{cls.__name__} has no such field; {hint}it has: {', '.join(known)}"
