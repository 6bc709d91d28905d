"""What ``deterministic=True`` costs on the demo model: throughput with and without it, the two engines in turns.

Two workloads: a batch of requests with prompts and answers of many lengths, and a single stream. Both engines run in
this process in float32 on the CPU, get the same prompts as token ids, decode greedily, ignore the end-of-sequence
token and return token ids. Rounds alternate between them, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MODES = {"default": False, "deterministic": True}


def workloads(args: argparse.Namespace) -> dict[str, list[tuple[list[int], int]]]:
    """Return each workload's requests: prompt ids and the number of new tokens."""
    draw = random.Random(args.seed)  # noqa: S311 (lengths, not secrets)
    batch = [
        ([draw.randrange(1000, 30_000) for _ in range(draw.randint(16, 256))], draw.randint(16, 64))
        for _ in range(args.requests)
    ]
    return {f"{args.requests} requests": batch, "single stream": [(batch[0][0][:64], 64)]}


def engine(*, deterministic: bool) -> Any:  # noqa: ANN401 (LLM, imported late)
    """Return the demo model behind an engine that takes 32 sequences at once."""
    from folo_core import LLM

    return LLM("demo", dtype="float32", max_model_len=512, max_num_seqs=32, deterministic=deterministic)


def seconds(
    llm: Any,  # noqa: ANN401 (LLM, imported late)
    requests: list[tuple[list[int], int]],
    clock: Callable[[], float],
) -> float:
    """Return how long the engine takes to answer all requests, by the clock."""
    from folo_core import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests]
    start = clock()
    outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    taken = clock() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == [new for _, new in requests]
    return taken


def race(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, the engines in turns; return each workload's seconds and the ratio of its median throughputs."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    engines = {name: engine(deterministic=on) for name, on in MODES.items()}
    found = {}
    for workload, requests in workloads(args).items():
        times: dict[str, list[float]] = {name: [] for name in MODES}
        for number in range(args.rounds + 1):
            for name in list(MODES) if number % 2 else list(MODES)[::-1]:
                taken = seconds(engines[name], requests, clock)
                if number:  # the first round warms up
                    times[name].append(taken)
        medians = {name: statistics.median(each) for name, each in times.items()}
        new = sum(count for _, count in requests)
        found[workload] = {
            "seconds": times,
            "tokens_per_s": {name: new / median for name, median in medians.items()},
            "ratio": medians["default"] / medians["deterministic"],
            "ratio_by_round": [a / b for a, b in zip(times["default"], times["deterministic"], strict=True)],
        }
    return found


def main() -> None:
    """Print each workload's throughput in both modes and their ratio, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32, help="requests of the batch (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both engines (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths (default 0)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, which a busy machine disturbs less"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    found = race(args)
    if args.json:
        print(json.dumps({"settings": vars(args), "results": found}, indent=2))
        return
    unit = "second of processor time" if args.cpu_time else "second"
    print(f"{args.threads} threads, {args.rounds} rounds in turns; new tokens per {unit}, by the median")
    for workload, result in found.items():
        rates, ratios = result["tokens_per_s"], result["ratio_by_round"]
        rounds = f"(by round: {min(ratios):.2f} to {max(ratios):.2f})"
        each = "   ".join(f"{name} {rate:6.1f}" for name, rate in rates.items())
        print(f"{workload:<14} {each}   ratio {result['ratio']:.2f} {rounds}")


if __name__ == "__main__":
    main()
