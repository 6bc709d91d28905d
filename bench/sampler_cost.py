"""What choosing tokens costs: samplers and logits processors, per call for a whole batch, without a model.

Logits are normal, as wide as the vocabulary; ``peaked`` ones are like a language model's, where few tokens matter.
Cases are measured in turns, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from folo_core.plugins.manager import load_registry
from folo_core.sampling.rng import uniform
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_context, make_metadata

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLED = {
    "random: plain": [{}],
    "random: top_k=50": [{"top_k": 50}],
    "random: top_k=50, top_p=0.9, min_p=0.05": [{"top_k": 50, "top_p": 0.9, "min_p": 0.05}],
    "random: top_k=1000": [{"top_k": 1000}],
    "random: top_k=5000": [{"top_k": 5000}],
    "random: top_p=0.9": [{"top_p": 0.9}],
    "random: top_p=0.9, temperature=100": [{"top_p": 0.9, "temperature": 100.0}],
    "random: min_p=0.05": [{"min_p": 0.05}],
    "random: a mix of plain, top_k, top_p, both": [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}],
}
PROCESSED = {
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "bias": {"logit_bias": dict.fromkeys(range(64), 1.0)},
    "min-tokens": {"min_tokens": 10_000, "max_tokens": None, "stop_token_ids": [1, 2], "resolved_eos": (0,)},
    "bad-words": {"resolved_bad_words": tuple((i, i + 1) for i in range(50))},
    "allowed-tokens": {"allowed_token_ids": list(range(1000))},
}


def cases(rows: int, vocab_size: int, history: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every measured call, by name."""
    registry = load_registry()
    normal = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 2.5
    peaked = (normal * 1.6 + 10 * (torch.rand(normal.shape) < 5 / vocab_size)).to(device)
    normal = normal.to(device)

    def metadata(choices: list[dict[str, object]]) -> object:
        params = [SamplingParams(**choices[row % len(choices)]) for row in range(rows)]
        tokens = [[(row + i * 7) % 997 for i in range(history)] for row in range(rows)]
        half = [history // 2] * rows
        return make_metadata(params, vocab_size=vocab_size, histories=tokens, prompt_lengths=half, device=device)

    context = make_context(vocab_size=vocab_size, device=device)
    greedy, random = (registry.get("samplers", name).build(context) for name in ("greedy", "random"))
    plain = metadata([{}])
    found: dict[str, Callable[[], object]] = {
        "random numbers": lambda: uniform(plain.seeds, plain.sequence_indices, plain.positions),
        "greedy": lambda: greedy.step(normal, plain),
    }
    for name, choices in SAMPLED.items():
        found[name] = partial(random.step, normal, metadata(choices))
    for name in ("random: plain", "random: top_k=50", "random: top_p=0.9"):
        found[f"{name}, peaked"] = partial(random.step, peaked, metadata(SAMPLED[name]))
    for name, fields in PROCESSED.items():
        part = registry.get("logits_processors", name).build(vocab_size, device)
        label = f"{name} ({history} tokens)" if part.needs_history else name
        found[label] = partial(part.apply, normal, metadata([fields]))
    return found


def measure(found: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return seconds per call, one per round and case. The first, uncounted round warms up."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, call in found.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print median and best milliseconds per call, or both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="sequences in the batch (default 32)")
    parser.add_argument("--vocab", type=int, default=49_152, help="tokens in the vocabulary (default 49152)")
    parser.add_argument("--history", type=int, default=500, help="tokens before the one sampled (default 500)")
    parser.add_argument("--rounds", type=int, default=11, help="measured calls of each case (default 11)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON, in milliseconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    times = measure(cases(args.rows, args.vocab, args.history, device), args.rounds, device)
    results = {n: {"median_ms": statistics.median(t) * 1e3, "best_ms": min(t) * 1e3} for n, t in times.items()}
    if args.json:
        print(json.dumps({"settings": vars(args), "results": results}, indent=2))
        return
    print(f"{args.rows} rows x {args.vocab} tokens, {args.device}, {args.threads} threads; milliseconds per call")
    for name, result in results.items():
        print(f"{name:<44} median {result['median_ms']:8.2f}   best {result['best_ms']:8.2f}")


if __name__ == "__main__":
    main()
