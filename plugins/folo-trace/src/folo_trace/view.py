"""Draws gauges: as a view for a terminal, as a line of plain text, and as the summary at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    Figures = Mapping[str, Any]

STYLES = {"running": "green", "swapped out": "magenta", "preempted": "yellow"}
USED, CACHED, FREE = ("█", "green"), ("▒", "cyan"), ("░", "bright_black")
"""The parts of a bar: they differ in shape, for those who see no colour."""
LABEL_WIDTH = 14
BAR_WIDTHS, BESIDE_BAR = (10, 36), 70
"""The least and the most cells of a bar, and those that the texts around it take."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTOR = 1024
_MANY_UNITS = 100
"""So many need no decimal."""


def view(figures: Figures, title: str, size: tuple[int, int]) -> RenderableType:
    """Return the live view for a terminal of ``size`` (columns, lines), with as many requests as it has room for."""
    width, height = size
    least, most = BAR_WIDTHS
    head = grid(_lines(figures, max(least, min(most, width - BESIDE_BAR))))
    table = _requests(figures, max(height - head.row_count - 6, 1))
    return Group(_title(figures, title), "", head, "", table)


def line(figures: Figures) -> str:
    """Return the present state as one line of plain text."""
    rates, parts = figures["per_second"], [f"{figures['seconds']:.0f} s", f"step {figures['num_steps']}"]
    parts.append(f"prefill {rates['prefill_tokens']:.0f} and decode {rates['decode_tokens']:.0f} tokens/s")
    parts.append(f"{figures['num_running']} running, {_waiting(figures)} waiting, {figures['num_swapped']} swapped")
    parts.append(f"{sum(figures['finished'].values())} finished, {figures['num_preemptions']} preemptions")
    if "blocks" in figures:
        blocks = figures["blocks"]
        parts.append(f"blocks {blocks['used']} used + {blocks['cached']} cached of {blocks['total']}")
        if figures["prefix_cache"]["hit_tokens"]:
            parts.append(f"{100 * figures['prefix_cache']['hit_rate']:.0f} % hits")
    return "  ".join(parts)


def summary(figures: Figures) -> list[tuple[str, str]]:
    """Return what a whole run came to, as pairs of a name and a text."""
    rates = figures["per_second"]
    rows = [
        ("time", f"{figures['seconds']:.1f} s, {figures['num_steps']:,} steps, {rates['steps']:.1f} a second"),
        ("prefill", f"{figures['prefill_tokens']:,} tokens, {rates['prefill_tokens']:.1f} a second"),
        ("decode", f"{figures['decode_tokens']:,} tokens, {rates['decode_tokens']:.1f} a second"),
        ("finished", _finished(figures)),
        ("preemptions", _preemptions(figures)),
    ]
    if "blocks" in figures:
        total, size = figures["blocks"]["total"], figures["block_bytes"]
        peak = figures["peak_blocks"]
        rows.append(("blocks", f"{peak} of {total} at the peak{_in_bytes(peak * size, total * size)}"))
        rows += [("prefix cache", _hits(figures))] * bool(figures["prefix_cache"]["hit_tokens"])
    return rows


def _title(figures: Figures, title: str) -> Text:
    minutes, seconds = divmod(int(figures["seconds"]), 60)
    rate = figures["per_second"]["steps"]
    text = Text(title, style="bold")
    text.append(f"   {minutes:02d}:{seconds:02d}   step {figures['num_steps']:,}   {rate:.1f} steps/s", style="none")
    return text


def _lines(figures: Figures, bar: int) -> list[tuple[str, Text]]:
    rates = figures["per_second"]
    speed = Text.assemble(
        (f"{rates['prefill_tokens']:,.1f}", "bold"),
        " prefill   ",
        (f"{rates['decode_tokens']:,.1f}", "bold"),
        " decode",
    )
    counts = [
        (figures["num_running"], "running", STYLES["running"]),
        (_waiting(figures), "waiting", "none"),
        (figures["num_swapped"], "swapped", STYLES["swapped out"]),
    ]
    batch = Text("   ").join(Text.assemble((f"{n:,}", f"bold {style}"), f" {name}") for n, name, style in counts)
    batch.append(f"   {_finished(figures)}")
    lines = [("tokens/s", speed), ("requests", batch), ("preemptions", Text(_preemptions(figures)))]
    return lines + (_memory_lines(figures, bar) if "blocks" in figures else [])


def _memory_lines(figures: Figures, bar: int) -> list[tuple[str, Text]]:
    blocks, host, size = figures["blocks"], figures["host_blocks"], figures["block_bytes"]
    counts = f"{blocks['used']} used, {blocks['cached']} cached, {blocks['free']} free of {blocks['total']}"
    parts = [(blocks["used"], USED), (blocks["cached"], CACHED), (blocks["free"], FREE)]
    lines = [("blocks", _bar(bar, parts, counts + _in_bytes(blocks["used"] * size, blocks["total"] * size)))]
    if host["total"]:
        parts = [(host["used"], USED), (host["total"] - host["used"], FREE)]
        counts = f"{host['used']} used of {host['total']}"
        lines.append(("host blocks", _bar(bar, parts, counts + _in_bytes(host["used"] * size, host["total"] * size))))
    if figures["prefix_cache"]["hit_tokens"]:
        found, asked = figures["prefix_cache"]["hit_tokens"], figures["prefix_cache"]["queried_tokens"]
        lines.append(("prefix cache", _bar(bar, [(found, CACHED), (asked - found, FREE)], _hits(figures))))
    return lines


def _bar(width: int, parts: list[tuple[int, tuple[str, str]]], text: str) -> Text:
    """Draw shares of a whole; whatever is not nothing gets a cell at least."""
    total = sum(count for count, _ in parts) or 1
    cells = [max(round(width * count / total), count > 0) for count, _ in parts]
    cells[cells.index(max(cells))] += width - sum(cells)
    bar = Text.assemble(*((sign * length, style) for length, (_, (sign, style)) in zip(cells, parts, strict=True)))
    return bar.append(f"  {text}")


def _requests(figures: Figures, most: int) -> RenderableType:
    """Return a table of those that hold or held memory: who runs, then who had to leave."""
    rows = sorted(figures["requests"], key=lambda row: row["state"] != "running")
    if not rows:
        return ""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("request", max_width=32, no_wrap=True, overflow="ellipsis")
    table.add_column("tenant", max_width=16, no_wrap=True, overflow="ellipsis")
    for name in ("prompt", "output", "preempted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in rows[:most]:
        counts = [f"{row[name]:,}" for name in ("prompt_tokens", "output_tokens", "preemptions")]
        state = Text(row["state"], STYLES.get(row["state"], "none"))
        table.add_row(Text(row["id"]), Text(row["tenant"] or "-"), *counts, state)
    more = len(rows) - most
    return Group(table, Text(f"… and {more} more", style="bright_black")) if more > 0 else table


def _waiting(figures: Figures) -> int:
    """Requests that wait and do not lie on the host."""
    waiting: int = figures["num_waiting"] - figures["num_swapped"]
    return waiting


def _finished(figures: Figures) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(figures["finished"].items()))
    return f"{sum(figures['finished'].values()):,} finished" + (f" ({reasons})" if reasons else "")


def _preemptions(figures: Figures) -> str:
    text = f"{figures['num_preemptions']:,}"
    if figures["num_swaps"]:
        moved = f"{figures['swapped_out_blocks']:,} blocks out, {figures['swapped_in_blocks']:,} in"
        text += f", {figures['num_swaps']:,} of them swaps: {moved}"
    return text


def _hits(figures: Figures) -> str:
    cache = figures["prefix_cache"]
    return f"{100 * cache['hit_rate']:.1f} % of {cache['queried_tokens']:,} tokens found"


def _in_bytes(used: int, total: int) -> str:
    """Return both in the unit that suits the total; nothing if nobody said what a block takes."""
    power = next((i for i in range(len(_UNITS)) if total < _FACTOR ** (i + 1)), len(_UNITS) - 1)
    used_units, total_units = used / _FACTOR**power, total / _FACTOR**power
    digits = 1 if power and total_units < _MANY_UNITS else 0
    return f" ({used_units:.{digits}f} of {total_units:.{digits}f} {_UNITS[power]})" if total else ""


def grid(rows: Iterable[tuple[str, Text]]) -> Table:
    """Return names and texts in two columns, for a terminal."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_WIDTH, style="bright_black")
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, text in rows:
        table.add_row(name, text)
    return table
