"""What other engines reach on one H100 80 GB with the same models and requests, and the table that sets Folo beside it.

Measured with torch 2.11, vLLM 0.26.0 (its defaults, the engine in the caller's process where that is faster) and
transformers 5.17 (``generate``, and its continuous batching), while the device copied 3.02 TB/s (read and written) and
multiplied 723 TFLOP/s in bfloat16. On another card they are leads, not anchors.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

import ceilings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ceilings import Ceilings
    from gpu_workloads import Workload
    from measure import Sample
    from shapes import Shape


@attrs.frozen
class Anchor:
    """The fastest other engine on a workload, and what Folo set itself to reach."""

    figure: float
    engine: str
    target: float


ANCHORS = {
    "W1 A": Anchor(18_407, "vLLM", 22_000),
    "W2 B": Anchor(8_967, "vLLM", 9_900),
    "W3 A": Anchor(1.63, "vLLM", 1.0),
    "W3 B": Anchor(6.60, "vLLM", 5.9),
    "W4 A width 4": Anchor(16 * 128 / 5.90, "transformers", 16 * 128 / 0.6),
    "W4 A width 8": Anchor(16 * 128 / 5.48, "transformers", 16 * 128 / 0.9),
    "W4 B width 4": Anchor(16 * 128 / 5.63, "transformers", 16 * 128 / 1.2),
    "W4 B width 8": Anchor(16 * 128 / 13.5, "vLLM", 16 * 128 / 1.8),
    "W5 A": Anchor(24_380, "vLLM", 30_000),
    "W6 A cold": Anchor(15_195, "vLLM", 15_195),
    "W6 A second": Anchor(13_796, "vLLM", 20_000),
}
"""By the line of the table: tokens per second, or milliseconds per token where one request is alone."""


@attrs.frozen(kw_only=True)
class Line:
    """One line of the table."""

    key: str
    unit: str
    figure: float
    """Median of the rounds."""
    slowest: float
    fastest: float
    rounds: int
    first_token: float | None
    """Median milliseconds to the first token, where one request is alone."""
    limit: float
    """The figure if the device did nothing but what must be, at the rates measured in the same run."""
    anchor: float | None
    engine: str
    target: float | None

    @property
    def share(self) -> float:
        """How much of the limit is reached, 1 for all of it."""
        return self.limit / self.figure if self.unit == "ms/token" else self.figure / self.limit

    @property
    def ahead(self) -> float | None:
        """How many times as fast as the fastest other engine."""
        if self.anchor is None:
            return None
        return self.anchor / self.figure if self.unit == "ms/token" else self.figure / self.anchor


def figure(sample: Sample) -> float:
    """Return a run's figure: milliseconds per token after the first of a request alone, else tokens per second."""
    if sample.first is None:
        return sample.tokens / sample.seconds
    return 1e3 * (sample.seconds - sample.first) / (sample.tokens - 1)


def line(workload: Workload, shape: Shape, samples: Sequence[Sample], rates: Ceilings, *, tiny: bool) -> Line:
    """Sum up the rounds of one line; anchors are those of the full sizes."""
    key, alone = samples[0].key, workload.kind == "single"
    figures = sorted(map(figure, samples), reverse=alone)
    anchor = None if tiny else ANCHORS.get(key)
    if alone:
        limit = 1e3 * ceilings.token_limit(workload, shape, rates)
    else:
        cached = key.endswith("second")
        limit = workload.tokens / ceilings.limit_seconds(workload, shape, rates, cached=cached)
    return Line(
        key=key,
        unit="ms/token" if alone else "tok/s",
        figure=statistics.median(figures),
        slowest=figures[0],
        fastest=figures[-1],
        rounds=len(samples),
        first_token=statistics.median(1e3 * (sample.first or 0.0) for sample in samples) if alone else None,
        limit=limit,
        anchor=anchor.figure if anchor else None,
        engine=anchor.engine if anchor else "",
        target=anchor.target if anchor else None,
    )


def table(lines: Sequence[Line]) -> str:
    """Return the lines as text in columns."""
    head = ["workload", "unit", "figure", "slowest..fastest", "anchor", "x", "target", "limit", "share", "note"]
    rows = [head, *map(_cells, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    left = {0, 1, len(head) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cells(each: Line) -> list[str]:
    ahead = "-" if each.ahead is None else f"{each.ahead:.2f}"
    note = f"anchor: {each.engine}" if each.engine else ""
    if each.first_token is not None:
        note = f"first token {each.first_token:.1f} ms" + (f"; {note}" if note else "")
    spread = f"{_number(each.slowest)}..{_number(each.fastest)}"
    numbers = [_number(each.figure), spread, _number(each.anchor), ahead, _number(each.target), _number(each.limit)]
    return [each.key, each.unit, *numbers, f"{each.share:.0%}", note]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"  # noqa: PLR2004 (two digits where they say something)
