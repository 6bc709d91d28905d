"""What a step costs outside the model: as a share of the demo model's step, and per row with a model without weights.

Only steady decode steps are measured: every request runs, none begins or ends. Text is asked for in three ways:
at the end (as ``LLM.generate`` does), piece by piece (``stream``), and not at all.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import TYPE_CHECKING

import torch

from folo_core import LLM, SamplingParams
from folo_core.engine.engine import Engine
from folo_core.testing.fakes import FakeModel, fake_components
from stages import STAGES, Stages

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_TOKENS = 3
"""Tokens that every request has before anything is measured."""
MODEL_STAGES = {"forward", "attention plan"}
KINDS: dict[str, dict[str, object]] = {
    "greedy, text at the end": {"temperature": 0, "output_kind": "FINAL_ONLY"},
    "greedy, text streamed": {"temperature": 0, "output_kind": "DELTA"},
    "greedy, no text": {"temperature": 0, "output_kind": "FINAL_ONLY", "detokenize": False},
    "random, top_k=50 top_p=0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "output_kind": "FINAL_ONLY"},
}


def decode_steps(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, steps: int, clock: Callable[[], float]
) -> tuple[list[float], dict[str, float]]:
    """Run ``prompts`` side by side through ``steps`` decode steps.

    Returns:
        Seconds outside the model of each step, and each stage's median seconds a step.
    """
    names = [f"row-{row}" for row in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    requests = [engine.requests[name] for name in names]
    while any(request.metrics.num_generated_tokens < WARM_TOKENS for request in requests):
        engine.step()
    stages, found, outside = Stages(engine, clock), [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            stages.clear()
            engine.step()
            outside.append(sum(s for stage, s in stages.seconds.items() if stage not in MODEL_STAGES))
            found.append(dict(stages.seconds))
    finally:
        gc.enable()
        stages.close()
        engine.abort(names)
    return outside, {stage: statistics.median(seconds.get(stage, 0.0) for seconds in found) for stage in STAGES}


def report(title: str, outside: list[float], stages: dict[str, float], rows: int) -> None:
    """Print one workload's figures."""
    step, middle = sum(stages.values()), statistics.median(outside)
    print(
        f"{title}: outside the model {middle * 1e3:.2f} ms a step (best {min(outside) * 1e3:.2f}), "
        f"{middle / rows * 1e6:.1f} us a row (best {min(outside) / rows * 1e6:.1f}), "
        f"{middle / step:.1%} of a step of {step * 1e3:.1f} ms"
    )
    for stage, seconds in stages.items():
        print(f"    {stage:<20} {seconds * 1e3:8.3f} ms  {seconds / rows * 1e6:8.2f} us a row  {seconds / step:6.1%}")


def demo(args: argparse.Namespace) -> None:
    """Measure the demo model at ``args.rows`` rows."""
    engine = LLM("demo", max_num_seqs=args.rows, max_model_len=512).engine
    vocab = engine.executor.model_info.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, vocab, (64,), generator=generator).tolist() for _ in range(args.rows)]
    for name, fields in KINDS.items():
        params = SamplingParams(max_tokens=400, ignore_eos=True, **fields)
        found = decode_steps(engine, prompts, params, args.demo_steps, time.perf_counter)
        report(f"demo model, {args.rows} rows, {name}", *found, args.rows)


def fake(args: argparse.Namespace) -> None:
    """Measure the engine alone at ``args.fake_rows`` rows: the fake model's own time is shown apart."""
    clock = time.thread_time if args.cpu_time else time.perf_counter
    for name, fields in KINDS.items():
        rows = args.fake_rows
        engine = Engine(
            fake_components(FakeModel(max_model_len=512), max_num_seqs=rows, num_blocks=64 * rows, block_size=16)
        )
        prompts = [[(row + place) % 50 for place in range(16)] for row in range(rows)]
        params = SamplingParams(max_tokens=400, ignore_eos=True, **fields)
        report(f"fake model, {rows} rows, {name}", *decode_steps(engine, prompts, params, args.fake_steps, clock), rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="requests of the demo model (default 32)")
    parser.add_argument("--demo-steps", type=int, default=12, help="measured steps of it (default 12)")
    parser.add_argument("--fake-rows", type=int, default=256, help="requests of the fake model (default 256)")
    parser.add_argument("--fake-steps", type=int, default=60, help="measured steps of it (default 60)")
    parser.add_argument("--only", choices=["demo", "fake"], help="one of the two tables")
    parser.add_argument("--cpu-time", action="store_true", help="the fake model's table by processor time")
    args = parser.parse_args()
    if args.only != "demo":
        fake(args)
    if args.only != "fake":
        demo(args)


if __name__ == "__main__":
    main()
