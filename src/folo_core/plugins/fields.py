"""What an attrs class says of its own fields, for listings, documentation and the conformance kit."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

import attrs

from folo_core.sampling_params import SamplingParams


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a class and of its bases; fields without one are absent."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built in, or made where there is no source
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = _string(following)
                docs |= {statement.target.id: text} if text else {}
    return docs


def own_fields(cls: type) -> list[dict[str, Any]]:
    """Fields that an attrs class adds to SamplingParams: name, type, default, whether required, and docs."""
    inherited = {field.name for field in attrs.fields(SamplingParams)} if issubclass(cls, SamplingParams) else set()
    docs = field_docs(cls)
    return [
        {
            "name": field.alias or field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", repr(field.type)),
            "default": None if field.default is attrs.NOTHING else _plain(field.default),
            "required": field.default is attrs.NOTHING,
            "doc": docs.get(field.name, ""),
        }
        for field in attrs.fields(cls)
        if field.name not in inherited
    ]


def _string(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(statement.value.value) if isinstance(statement.value.value, str) else ""
    return ""


def _plain(default: Any) -> Any:  # noqa: ANN401 (any default)
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return "(built per object)"
    return default if isinstance(default, str | int | float | bool | None) else repr(default)
