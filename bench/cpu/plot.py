"""One picture of all results: a panel for each workload, a bar for each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers import ENGINES
from verdict import OURS, Spread, measured
from workloads import WORKLOADS

if TYPE_CHECKING:
    from pathlib import Path

    from verdict import Results

OUR_COLOUR, THEIR_COLOUR = "#d1495b", "#8d99ae"


def draw(results: Results, path: Path) -> None:
    """Write the picture: bars are medians, whiskers go from the slowest round to the fastest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in measured(results) if any(results.of(name, engine) for engine in ENGINES)]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes.flat, strict=False):
        _panel(axis, results, name)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, results: Results, name: str) -> None:  # noqa: ANN401 (matplotlib's types are loose)
    engines = [engine for engine in ENGINES if results.of(name, engine)]
    workload = WORKLOADS[name]
    spreads = [Spread.of([workload.result(run.seconds) for run in results.of(name, engine)]) for engine in engines]
    medians = [spread.median for spread in spreads]
    reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    colours = [OUR_COLOUR if engine == OURS else THEIR_COLOUR for engine in engines]
    shown = [ENGINES[engine].shown for engine in engines]
    bars = axis.barh(shown, medians, xerr=reach, color=colours, ecolor="#333333", capsize=3, height=0.65)
    axis.bar_label(bars, labels=[f" {median:.1f}" for median in medians], padding=6)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)
    better = "less" if workload.unit == "ms/token" else "more"
    axis.set_xlabel(f"{workload.unit} ({better} is better)")
    axis.set_title(f"{name}: {workload.short}", loc="left", fontsize=10)
