"""How long the products of low-bit weights take on a CUDA device, beside bfloat16's, for the shapes of both models.

``python bench/gpu/low_bit.py [--rows 1,8,64,256,2048,8192]`` prints microseconds of one product, from CUDA graphs so
that the host does not count; ``int4`` both as the kernel for few rows and unpacked first, which is what ``FEW_ROWS``
of ``folo_hf.low_bit`` decides between. Errors are those of the whole product, relative to bfloat16's.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from folo_hf.low_bit import GROUP, Int4, quantise

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {
    "A qkv": (4096, 1024),
    "A out": (1024, 2048),
    "A gate+up": (6144, 1024),
    "A down": (1024, 3072),
    "A head": (151_936, 1024),
    "B qkv": (6144, 4096),
    "B out": (4096, 4096),
    "B gate+up": (28_672, 4096),
    "B down": (4096, 14_336),
    "B head": (128_256, 4096),
}
"""``(out, in)`` of the products of a layer and of the head (``shapes.py``)."""

FLUSH_BYTES = 128 * 2**20
"""More than a device's cache holds: written between two products, so that weights come from memory."""


def microseconds(work: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median time of a call, from a graph of its own, with weights out of the cache."""
    if device == "cpu":
        work()
        return 0.0
    for _ in range(3):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times: list[float] = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


def products(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return every way to multiply by a weight."""
    four = quantise(weight, "int4")
    assert isinstance(four, Int4)

    def packed(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, four.packed, GROUP, four.steps)  # noqa: SLF001
        return found

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "bf16": lambda x: functional.linear(x, weight),
        "fp8": quantise(weight, "fp8"),
    }
    if weight.is_cuda:
        return ways | {"int4 packed": packed, "int4 unpacked": lambda x: functional.linear(x, four.plain())}
    return ways | {"int4": four}


def measure(name: str, rows: list[int], device: str, scale: int) -> list[dict[str, object]]:
    """Measure one shape; ``scale`` divides it, to try the script itself."""
    outputs, inputs = (size // scale // 128 * 128 or 128 for size in SHAPES[name])
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(torch.bfloat16)
    ways = products(weight)
    lines = []
    for count in rows:
        x = torch.randn(count, inputs, device=device).to(torch.bfloat16)
        exact = ways["bf16"](x).float()
        line: dict[str, object] = {"shape": name, "rows": count}
        for way, multiply in ways.items():
            line[f"{way} us"] = microseconds(functools.partial(multiply, x), device)
            line[f"{way} error"] = float((multiply(x).float() - exact).norm() / exact.norm())
        lines.append(line)
        print("  ".join(_cell(key, value) for key, value in line.items() if key != "bf16 error"), flush=True)
    return lines


def _cell(key: str, value: object) -> str:
    return f"{key} {value:8.3g}" if isinstance(value, float) else f"{value!s:>9}"


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64, 256, 2048, 8192])
    add(
        "--shapes",
        type=lambda text: text.split(","),
        default=list(SHAPES),
        metavar="NAMES",
        help="such as 'A qkv,B out'",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--scale", type=int, default=1, help="divide all sizes by this, to try the script")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    lines = [line for name in args.shapes for line in measure(name, args.rows, args.device, args.scale)]
    if args.json is not None:
        args.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
