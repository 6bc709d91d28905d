"""How fast linear layers are for every number of rows, beside oneDNN's packed product and the machine's best rate.

Shapes are those of one layer of the demo model, over more weights than caches hold, as in a step. Kinds are timed in
turns, so that a slow minute meets all of them; a figure is the best of all turns. The machine's best rate is that of
products of 1024 and of 2048 squared matrices, by torch or by the kernels, in the same turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

import torch

from folo_kernels import library
from folo_kernels.matrix import Format, PackedMatrix, Plain

if TYPE_CHECKING:
    from collections.abc import Callable

LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Outputs and inputs of the demo model's projections."""
ROWS = (*range(1, 17), 24, 32, 64, 128, 256)
COPIES = 8
"""Layers' worth of weights: 113 MB in float32."""
ENOUGH, SHARE, SLACK = 16, 0.7, 1.02


def kinds(quantised: bool) -> dict[str, Callable[[torch.Tensor], object]]:  # noqa: FBT001 (a switch of this script)
    """Products with all weights, by name, given rows as wide as the widest input."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(COPIES) for shape in LAYER]
    formats = [Format.FLOAT32, *([Format.INT8, Format.INT4] if quantised else [])]
    packed = {kind: [PackedMatrix([Plain(weight)], kind) for weight in weights] for kind in formats}
    onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, 32) for weight in weights]  # noqa: SLF001 (no public way)

    def run_packed(matrices: list[PackedMatrix], x: torch.Tensor) -> None:
        for matrix in matrices:
            matrix.multiply(x[:, : matrix.inputs])

    def run_onednn(x: torch.Tensor) -> None:
        inputs = {width: x[:, :width].contiguous() for _, width in LAYER}
        for weight in onednn:
            torch.ops.mkldnn._linear_pointwise(inputs[weight.shape[1]], weight, None, "none", [], "")  # noqa: SLF001

    return {
        **{f"folo {kind.name.lower()}": lambda x, m=matrices: run_packed(m, x) for kind, matrices in packed.items()},
        "oneDNN": run_onednn,
    }


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def squares() -> dict[str, tuple[float, Callable[[], object]]]:
    """Products that show the machine's best rate, with their floating-point operations."""
    found: dict[str, tuple[float, Callable[[], object]]] = {}
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        matrix = PackedMatrix([Plain(b)])
        found[f"torch {size}"] = 2 * size**3, lambda a=a, b=b: a @ b
        found[f"folo {size}"] = 2 * size**3, lambda a=a, m=matrix: m.multiply(a)
    return found


def measure(turns: int, *, quantised: bool) -> dict[str, object]:
    """GFLOP/s by kind and number of rows, and the machine's best rate."""
    products, peaks = kinds(quantised), squares()
    flops = 2 * COPIES * sum(outputs * inputs for outputs, inputs in LAYER)
    x = {rows: torch.randn(rows, max(width for _, width in LAYER)) for rows in ROWS}
    best = {name: dict.fromkeys(ROWS, float("inf")) for name in products}
    rate = 0.0
    for turn in range(turns + 1):
        for work in products.values():
            work(x[16])
        for rows in ROWS:
            for name, work in products.items():
                taken = seconds(lambda work=work, rows=rows: work(x[rows]))
                best[name][rows] = min(best[name][rows], taken)
        for operations, square in peaks.values():
            rate = max(rate, operations / seconds(square) / 1e9)
        print(f"turn {turn} of {turns}", file=sys.stderr)
    rates = {name: {rows: rows * flops / taken / 1e9 for rows, taken in each.items()} for name, each in best.items()}
    return {"best_rate": rate, "gflops": rates, "seconds": best}


def report(found: dict[str, object]) -> int:
    """Print the table; return 1 if the products fall short of what they promise."""
    rates: dict[str, dict[int, float]] = found["gflops"]  # type: ignore[assignment]
    taken: dict[str, dict[int, float]] = found["seconds"]  # type: ignore[assignment]
    best = float(found["best_rate"])  # type: ignore[arg-type]
    print(f"best rate {best:.0f} GFLOP/s, {torch.get_num_threads()} threads; GFLOP/s by rows, share of the best rate")
    print("rows " + "".join(f"{name:>20}" for name in rates))
    for rows in ROWS:
        print(f"{rows:>4} " + "".join(f"{each[rows]:>13.1f} {each[rows] / best:>5.0%} " for each in rates.values()))
    own, times = rates["folo float32"], taken["folo float32"]
    least = min(own[rows] for rows in ROWS if rows >= ENOUGH) / best
    dearest = max(times[rows] for rows in ROWS if 1 < rows < ENOUGH) / times[ENOUGH]
    print(f"from {ENOUGH} rows on at least {least:.0%} of the best rate; 2 to 15 rows cost at most {dearest:.2f} of 16")
    return int(least < SHARE or dearest > SLACK)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--quantised", action="store_true", help="also 8-bit and 4-bit weights")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    library.settled()
    found = measure(arguments.turns, quantised=arguments.quantised)
    if arguments.json:
        print(json.dumps(found))
        return 0
    return report(found)


if __name__ == "__main__":
    raise SystemExit(main())
