"""Renders chat templates in a process of its own. Run as a script; imports nothing but Jinja and the standard library.

A template comes with a model and is as little trusted as its author. Jinja's immutable sandbox keeps it away from
Python's internals but bounds neither time nor memory; this process has limits on memory, and its parent, which waits
for a bounded time, ends it.

Reads one JSON object a line (``template``, ``variables``, ``max_chars``), writes one a line (``text`` or ``error``).
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2.parser import Parser

MEMORY_BYTES = 2**29


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here it stands for its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance's)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (the names and order that templates use)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON without Jinja's escaping for HTML, as chat templates expect it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> jinja2.Template:
    """The template in the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any], max_chars: int) -> str:
    """The rendered text.

    Raises:
        ValueError: the text is longer than ``max_chars``.
        jinja2.TemplateError: the template is wrong, or refuses the conversation.
    """
    pieces, length = [], 0
    for piece in compile_template(template).generate(**variables):
        length += len(piece)
        if length > max_chars:
            raise ValueError(f"the rendered prompt is longer than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(line: str) -> dict[str, str]:
    """The reply to one request line."""
    try:
        request = json.loads(line)
        return {"text": render(request["template"], request["variables"], request["max_chars"])}
    except MemoryError:
        return {"error": f"the template wants more than {MEMORY_BYTES // 2**20} MiB"}
    except RecursionError:
        return {"error": "the template recurses too deeply"}
    except Exception as error:  # noqa: BLE001 (a template can raise anything)
        return {"error": f"{type(error).__name__}: {error}"}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    _limit_memory()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
