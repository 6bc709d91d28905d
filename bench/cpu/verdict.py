"""What the runs say: medians, spread, ratios within rounds, equal answers; as a table and as JSON."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import attrs

from peers import ENGINES
from workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contest import Run

OURS = "folo"
COLUMNS = ("engine", "settings", "median", "from - to", "Folo is", "from - to", "equal ids", "remarks")


@attrs.frozen
class Spread:
    """A median with what it lies between."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@attrs.frozen
class Agreement:
    """How many answers have the very ids of Folo's, and where the others first differ."""

    equal: int
    total: int
    first_difference: float | None
    """Median place, from 0, over the answers that differ; None if none does."""

    @classmethod
    def between(cls, ours: list[list[int]], theirs: list[list[int]]) -> Agreement:
        """Compare answer by answer."""
        pairs = list(zip(ours, theirs, strict=True))
        places = [
            next(place for place, (a, b) in enumerate(zip(x, y, strict=True)) if a != b) for x, y in pairs if x != y
        ]
        return cls(len(pairs) - len(places), len(pairs), statistics.median(places) if places else None)


@attrs.define
class Results:
    """All runs so far, the last greedy answers, and who took no part."""

    runs: list[Run] = attrs.field(factory=list)
    answers: dict[str, dict[str, list[list[int]]]] = attrs.field(factory=dict)
    """Ids by workload and engine."""
    skipped: dict[str, dict[str, str]] = attrs.field(factory=dict)
    """Reasons by workload and engine."""

    def next_round(self, workload: str) -> int:
        """Return the number of the round that comes after all known ones."""
        return max((run.round for run in self.runs if run.workload == workload), default=0) + 1

    def of(self, workload: str, engine: str) -> list[Run]:
        """Return an engine's runs of a workload: the undisturbed ones, or all if none was undisturbed."""
        runs = [run for run in self.runs if (run.workload, run.engine) == (workload, engine)]
        return [run for run in runs if not run.contended] or runs

    def ratios(self, workload: str, engine: str) -> list[float]:
        """Return how many times as fast Folo was, for each round in which both ran."""
        ours = {run.round: run.seconds for run in self.of(workload, OURS)}
        return [run.seconds / ours[run.round] for run in self.of(workload, engine) if run.round in ours]

    def agreement(self, workload: str, engine: str) -> Agreement | None:
        """Compare an engine's greedy answers with Folo's, if there are both."""
        found = self.answers.get(workload, {})
        if engine == OURS or OURS not in found or engine not in found:
            return None
        return Agreement.between(found[OURS], found[engine])


def summary(results: Results) -> dict[str, Any]:
    """Return medians, spread, ratios and agreement by workload and engine."""
    found: dict[str, Any] = {}
    for workload in measured(results):
        found[workload] = {}
        for engine in ENGINES:
            if runs := results.of(workload, engine):
                rates = Spread.of([WORKLOADS[workload].result(run.seconds) for run in runs])
                ratios = results.ratios(workload, engine)
                agreement = results.agreement(workload, engine)
                found[workload][engine] = {
                    WORKLOADS[workload].unit: attrs.asdict(rates),
                    "times_as_fast_is_folo": attrs.asdict(Spread.of(ratios)) if ratios else None,
                    "agreement": attrs.asdict(agreement) if agreement else None,
                }
    return found


def measured(results: Results) -> list[str]:
    """Return the workloads that something is known of, in their order."""
    known = {run.workload for run in results.runs} | set(results.skipped)
    return [name for name in WORKLOADS if name in known]


def rows(results: Results, workload: str) -> list[list[str]]:
    """Return a workload's lines of the table: engines that ran, then those that did not with the reason."""
    lines = [_row(results, workload, engine) for engine in ENGINES if results.of(workload, engine)]
    for engine, reason in results.skipped.get(workload, {}).items():
        if not results.of(workload, engine):
            lines.append([ENGINES[engine].shown, *["-"] * 6, f"skipped: {reason}"])
    return lines


def _row(results: Results, workload: str, engine: str) -> list[str]:
    runs = results.of(workload, engine)
    rate = Spread.of([WORKLOADS[workload].result(run.seconds) for run in runs])
    ratios = results.ratios(workload, engine)
    agreement = results.agreement(workload, engine)
    everything = [run for run in results.runs if (run.workload, run.engine) == (workload, engine)]
    contended = sum(run.contended for run in everything)
    remarks = [f"{len(everything)} round{'s' * (len(everything) > 1)}"] + (
        [f"{contended} contended"] if contended else []
    )
    if agreement and agreement.first_difference is not None:
        remarks.append(f"first difference at {agreement.first_difference:g}")
    times = ["-", "-"]
    if ratios and engine != OURS:
        spread = Spread.of(ratios)
        times = [f"{spread.median:.2f} x as fast", f"{spread.low:.2f} - {spread.high:.2f}"]
    return [
        ENGINES[engine].shown, ", ".join(sorted({run.candidate for run in runs})), f"{rate.median:.1f}",
        f"{rate.low:.1f} - {rate.high:.1f}", *times, f"{agreement.equal}/{agreement.total}" if agreement else "-",
        ", ".join(remarks),
    ]  # fmt: skip


def plain(results: Results) -> str:
    """Return all tables as text, columns aligned."""
    parts = []
    for workload in measured(results):
        lines = [list(COLUMNS), *rows(results, workload)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        parts.append("\n".join([title(workload), *(line.rstrip() for line in shown)]))
    return "\n\n".join(parts)


def title(workload: str) -> str:
    """Return a table's heading."""
    return f"{workload}: {WORKLOADS[workload].help} ({WORKLOADS[workload].unit})"


def pretty(results: Results) -> None:
    """Print all tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for workload in measured(results):
        table = Table(*COLUMNS, title=title(workload), title_justify="left")
        for line in rows(results, workload):
            table.add_row(*line, style="bold" if line[0] == ENGINES[OURS].shown else None)
        console.print(table)
