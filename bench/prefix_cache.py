"""What the prefix cache is worth: requests that begin alike, with the cache and without it, in turns.

Prints tokens per second of both, the ratio of each round, and the hit rate beside the one computed by hand. The answers
of both engines are compared; a difference is possible in principle, since a prompt that is computed in other pieces
differs in its last bits, unless --deterministic is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folo_core import LLM
    from folo_core.outputs import RequestOutput

BLOCK_SIZE = 16


def prompts_of(args: argparse.Namespace, vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
    """Random token ids: the same beginning for all, and an end of one's own."""
    generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    shared = [generator.randrange(vocab_size) for _ in range(args.shared)]
    own = [[generator.randrange(vocab_size) for _ in range(args.own)] for _ in range(args.requests)]
    return [{"prompt_token_ids": shared + tail} for tail in own]


def run(llm: LLM, prompts: list[dict[str, list[int]]], max_tokens: int) -> tuple[float, list[RequestOutput]]:
    """Return the seconds that all requests took, sent at once, and their outputs."""
    from folo_core import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, outputs


def hits_by_hand(args: argparse.Namespace) -> float:
    """Share of all prompt tokens that is found: the shared blocks of every request but the first, which fills them."""
    shared = args.shared // BLOCK_SIZE * BLOCK_SIZE
    return shared * (args.requests - 1) / (args.requests * (args.shared + args.own))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shared", type=int, default=512, help="tokens that all begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens of each one's own")
    parser.add_argument("--output", type=int, default=8, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_PROC_BIND", "true")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from folo_core import LLM

    options = {"max_num_seqs": args.requests, "kv_cache_bytes": "2GiB"} | (
        {"deterministic": True} if args.deterministic else {}
    )
    engines = {on: LLM(args.model, enable_prefix_caching=on, **options) for on in (False, True)}
    vocab_size = engines[True].engine.components.model_info.vocab_size
    for llm in engines.values():
        run(llm, [{"prompt_token_ids": [1, 2, 3]}], 2)
    ratios, rates, equal = [], {False: [], True: []}, 0
    for number in range(args.rounds):
        prompts = prompts_of(args, vocab_size, number)
        seconds, outputs = {}, {}
        for on in (False, True) if number % 2 else (True, False):
            before = engines[on].stats().prefix_cache
            seconds[on], outputs[on] = run(engines[on], prompts, args.output)
            rates[on].append(args.requests * args.output / seconds[on])
            after = engines[on].stats().prefix_cache
        ratios.append(seconds[False] / seconds[True])
        pairs = zip(outputs[False], outputs[True], strict=True)
        equal += sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs)
        assert sum(o.num_cached_tokens for o in outputs[True]) > 0, "the cache was used"
        del before, after
    stats = engines[True].stats().prefix_cache
    warm_up = 3
    report = {
        "requests": args.requests,
        "shared_tokens": args.shared,
        "own_tokens": args.own,
        "output_tokens": args.output,
        "tokens_per_second": {"off": statistics.median(rates[False]), "on": statistics.median(rates[True])},
        "times_as_fast": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "hit_rate": stats.num_hit_tokens / (stats.num_queried_tokens - warm_up),
        "hit_rate_by_hand": hits_by_hand(args),
        "equal_answers": f"{equal} of {args.requests * args.rounds}",
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
