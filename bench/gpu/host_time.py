"""What a decode step costs the host on a CUDA device, while the device works: by function, and beside the step's time.

A step's time is the larger of the two. Where they are near each other, the device waits for the host.

    python bench/gpu/host_time.py --model A --rows 1 256
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import measure
import shapes
from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine

WARM_STEPS = 30


def asked(args: argparse.Namespace) -> SamplingParams:
    """Return the parameters of every request."""
    common = {"max_tokens": 1500, "ignore_eos": True, "detokenize": False, "output_kind": "FINAL_ONLY"}
    if args.beam:
        from folo_beam import BeamParams

        return BeamParams(width=args.beam, **common)
    return SamplingParams(temperature=args.temperature, **common)


def fill(engine: Engine, rows: int, params: SamplingParams) -> None:
    """Admit requests and run them until all decode."""
    for row in range(rows):
        engine.add_request(f"{rows}-{row}", [row % 900 + 1] * 128, params)
    for _ in range(WARM_STEPS):
        engine.step()


def seconds_per_step(engine: Engine, steps: int) -> float:
    """Return the time of a step of the model, from its start to the next one's."""
    torch.cuda.synchronize()
    before, started = engine.step_count, time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / (engine.step_count - before)


def profile(engine: Engine, steps: int, lines: int) -> str:
    """Return the functions that took the host longest, in a table."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        engine.step()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    return "\n".join(line for line in text.getvalue().splitlines() if "{" in line or ".py" in line)


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("A", "B"), default="A")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--beam", type=int, default=0, metavar="WIDTH", help="search with beams; rows are requests then"
    )
    parser.add_argument("--lines", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = shapes.shapes(tiny=False)[args.model]
        empty = shapes.write_empty_folder(shape, Path(folder) / args.model)
        engine = measure.open_engine(shape, empty, "cuda", {}).engine
        for rows in args.rows:
            fill(engine, rows, asked(args))
            plain = seconds_per_step(engine, args.steps)
            print(f"\nmodel {args.model}, {rows} rows: {plain * 1e3:.3f} ms a step")
            print(profile(engine, args.steps, args.lines))
            engine.abort(list(engine.requests))
            while engine.step():
                pass


if __name__ == "__main__":
    main()
