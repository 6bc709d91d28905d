"""A cache that holds a tenth of what 256 requests need, against one that holds it all: in turns, deterministic.

Prints both throughputs and their ratio, and checks what must hold under such pressure: all requests finish, in the
order in which they came (all are of one length), the first is never preempted, and every answer is the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folo_core import LLM
    from folo_core.outputs import RequestOutput

BLOCK_SIZE = 16


def run(llm: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[float, dict[int, RequestOutput]]:
    """Send all requests at once; return the seconds they took, and their outputs in the order in which they ended."""
    from folo_core import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    started = time.perf_counter()
    ended = dict(llm.generate_as_finished([{"prompt_token_ids": prompt} for prompt in prompts], params))
    return time.perf_counter() - started, ended


def bits(output: RequestOutput) -> tuple[list[int], list[str]]:
    """Token ids and their log probabilities, exact."""
    answer = output.outputs[0]
    assert answer.logprobs is not None
    return answer.token_ids, [next(iter(entry.values())).logprob.hex() for entry in answer.logprobs]


def compare(engines: dict[str, LLM], prompts: list[list[int]], max_tokens: int, *, tight_first: bool) -> dict[str, Any]:
    """One round: both engines in turn, and what must hold."""
    seconds, ended = {}, {}
    for name in sorted(engines, reverse=tight_first):
        seconds[name], ended[name] = run(engines[name], prompts, max_tokens)
    tight = ended["tight"]
    assert len(tight) == len(prompts), "all finish"
    assert all(output.error is None for output in tight.values())
    metrics = [tight[place].metrics for place in range(len(prompts))]
    return {
        "ratio": seconds["tight"] / seconds["ample"],
        "seconds": seconds,
        "in_order": list(tight) == list(range(len(prompts))),
        "preemptions": sum(m.num_preemptions for m in metrics if m),
        "swaps": sum(m.num_swaps for m in metrics if m),
        "preemptions_of_the_first": metrics[0].num_preemptions if metrics[0] else None,
        "identical": sum(bits(tight[place]) == bits(ended["ample"][place]) for place in tight),
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--swap-space", default="1GiB", help="0 computes preempted requests anew")
    args = parser.parse_args()
    os.environ.setdefault("OMP_PROC_BIND", "true")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from folo_core import LLM

    needed = -(-(args.prompt + args.output) // BLOCK_SIZE) * args.requests
    common = {"deterministic": True, "max_model_len": args.prompt + args.output, "max_num_seqs": 64}
    engines = {
        "ample": LLM(args.model, num_blocks=needed, **common),
        "tight": LLM(args.model, num_blocks=needed // 10, swap_space=args.swap_space, **common),
    }
    vocab_size = engines["ample"].engine.components.model_info.vocab_size
    generator = random.Random(0)  # noqa: S311 (a workload, not a secret)
    prompts = [[generator.randrange(vocab_size) for _ in range(args.prompt)] for _ in range(args.requests)]
    for llm in engines.values():
        run(llm, prompts[:2], 2)
    rounds = [compare(engines, prompts, args.output, tight_first=bool(n % 2)) for n in range(args.rounds)]
    tokens = args.requests * args.output
    report = {
        "requests": args.requests,
        "blocks": {"needed": needed, "tight": needed // 10},
        "tokens_per_second": {
            name: tokens / statistics.median(r["seconds"][name] for r in rounds) for name in ("ample", "tight")
        },
        "times_as_slow": statistics.median(r["ratio"] for r in rounds),
        "rounds": rounds,
    }
    print(json.dumps(report, indent=2))
    assert all(r["in_order"] and r["identical"] == args.requests for r in rounds)
    assert all(r["preemptions"] and not r["preemptions_of_the_first"] for r in rounds)


if __name__ == "__main__":
    main()
