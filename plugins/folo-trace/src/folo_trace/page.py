"""Draws a trace: one HTML page with its style, script and data inside, which asks no network for anything."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def render(trace: Mapping[str, Any]) -> str:
    """Return the page of a trace.

    The data stand in a script element, where the only danger is a ``<``: it is written as JSON's own escape.
    The script puts texts on the page as text, never as markup.
    """
    folder = resources.files("folo_trace") / "page"
    page = (folder / "page.html").read_text(encoding="utf-8")
    parts = {
        "{{style}}": (folder / "page.css").read_text(encoding="utf-8"),
        "{{trace}}": embed(trace),
        "{{script}}": (folder / "page.js").read_text(encoding="utf-8"),
    }
    before, *rest = _split(page, list(parts))
    return before + "".join(parts[mark] + text for mark, text in zip(parts, rest, strict=True))


def _split(page: str, marks: list[str]) -> list[str]:
    """Cut the page at its marks, in order, so that no mark inside a part is taken for one of the page's."""
    pieces = []
    for mark in marks:
        piece, _, page = page.partition(mark)
        pieces.append(piece)
    return [*pieces, page]


def embed(value: object) -> str:
    """Return JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
