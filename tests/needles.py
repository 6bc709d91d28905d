"""Trials of determinism: one request, the needle, alone and then hidden in ever other company.

A trial draws a prompt, parameters and a crowd of other requests. It runs the needle alone on an engine with ample
memory and one thread, and then among the crowd on an engine that is short of memory, cuts prompts in other pieces,
swaps or computes anew, finds beginnings in its cache, and computes on one or two threads. Token ids and log
probabilities must be the same bits. ``python tests/needles.py --trials 1000`` prints the figures; ``--default-mode``
counts the differences that there are without ``deterministic``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from folo_core import LLM, SamplingParams
    from folo_core.outputs import RequestOutput

ROOT = Path(__file__).parents[1]
MODELS = ("llama", "qwen3", "gemma2")
ROOMY: dict[str, Any] = {"num_blocks": 256, "block_size": 8, "max_num_batched_tokens": 512, "max_num_seqs": 32}
TIGHT = {"num_blocks": 30, "max_num_seqs": 12}
CROWDED: tuple[dict[str, Any], ...] = (
    {**TIGHT, "block_size": 4, "max_num_batched_tokens": 19, "preemption": "recompute"},
    {**TIGHT, "block_size": 4, "max_num_batched_tokens": 64, "swap_space": "2MiB", "preemption": "swap"},
    {**TIGHT, "block_size": 4, "max_num_batched_tokens": 33, "enable_prefix_caching": True, "preemption": "recompute"},
    {**TIGHT, "block_size": 4, "max_num_batched_tokens": 27, "enable_prefix_caching": True, "swap_space": "64KiB"},
    {
        "num_blocks": 128,
        "block_size": 16,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 20,
        "enable_prefix_caching": True,
    },
    {
        "num_blocks": 200,
        "block_size": 8,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 20,
        "long_prefill_token_threshold": 5,
    },
)
"""Engines for the crowd. Those that are short of memory have room for about a fifth of what the crowd would take."""
SHORT_OF_MEMORY = 4
MAX_MODEL_LEN = 96


@attrs.define
class Tally:
    """What all trials together came to."""

    trials: int = 0
    mismatches: int = 0
    with_three_preemptions: int = 0
    """Trials in which requests were preempted three times or more."""
    needles_preempted: int = 0
    preemptions: int = 0
    swaps: int = 0
    hit_tokens: int = 0
    failed: list[int] = attrs.field(factory=list)
    """Numbers of the trials with a mismatch."""


class Stand:
    """A model's engines: one for the needle alone, the others for the crowd."""

    def __init__(self, folder: Path, vocab_size: int, *, deterministic: bool) -> None:
        from folo_core import LLM

        common: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": MAX_MODEL_LEN}
        common |= {"deterministic": True} if deterministic else {}
        self.vocab_size = vocab_size
        self.alone = LLM(str(folder), **common, **ROOMY)
        self.crowded = [LLM(str(folder), **common, **options) for options in CROWDED]


def stands(names: tuple[str, ...], *, deterministic: bool) -> Iterator[Stand]:
    """Build the engines of tiny random models."""
    sys.path.append(str(ROOT / "plugins" / "folo-hf" / "tests"))
    from tiny_models import ARCHITECTURES, VOCAB, save_model

    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield Stand(save_model(Path(folder), ARCHITECTURES[name]()), VOCAB, deterministic=deterministic)


def draw_params(r: random.Random, max_tokens: int) -> SamplingParams:
    """Greedy, random, three candidates, beams or guesses, all with log probabilities."""
    from folo_beam import BeamParams
    from folo_core import SamplingParams
    from folo_speculative import SpeculativeParams

    common: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": 3, "ignore_eos": True, "detokenize": False}
    kind, seed = r.randrange(6), r.randrange(2**31)
    if kind == 0:
        return BeamParams(width=3, num_return_sequences=3, **common)
    if kind == 1:
        return SamplingParams(n=2, best_of=3, temperature=0.9, seed=seed, **common)
    if kind == 2:
        return SpeculativeParams(temperature=0.0, **common)
    return SamplingParams(temperature=r.choice([0.0, 0.7, 1.3]), top_p=r.choice([0.9, 1.0]), seed=seed, **common)


def draw_prompt(r: random.Random, vocab_size: int) -> list[int]:
    """Return a prompt; half of all prompts begin alike."""
    shared = [5 + i * 7 % (vocab_size - 8) for i in range(16)] if r.random() < 0.5 else []
    return shared + [r.randrange(3, vocab_size) for _ in range(r.randint(1, 20))]


def bits(output: RequestOutput) -> list[Any]:
    """Return all that must be equal: ranked token ids with their log probabilities, as exact numbers."""
    assert output.error is None, output.error
    return [
        (o.token_ids, o.cumulative_logprob, [[(t, e.logprob.hex(), e.rank) for t, e in p.items()] for p in o.logprobs])
        for o in output.outputs
    ]


def run_trial(stand: Stand, number: int, tally: Tally) -> None:
    """Run one trial and note what came of it."""
    import torch

    from folo_core import SamplingParams

    r = random.Random(number)
    prompt, params = draw_prompt(r, stand.vocab_size), draw_params(r, r.randint(6, 24))
    torch.set_num_threads(1)
    wanted = bits(stand.alone.generate([prompt], params, use_tqdm=False)[0])
    place = r.randrange(len(stand.crowded)) if r.random() < 0.4 else r.randrange(SHORT_OF_MEMORY)
    llm: LLM = stand.crowded[place]
    others = [draw_prompt(r, stand.vocab_size) for _ in range(r.randint(2, 9))]
    most = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True, detokenize=False)
    crowd = [attrs.evolve(most, max_tokens=r.randint(8, 40)) for _ in others]
    hidden = r.randint(0, len(others))
    torch.set_num_threads(r.choice([1, 2]))
    before = llm.stats()
    prompts = [*others[:hidden], prompt, *others[hidden:]]
    outputs = llm.generate(prompts, [*crowd[:hidden], params, *crowd[hidden:]], use_tqdm=False)
    after = llm.stats()
    preemptions = after.num_preemptions - before.num_preemptions
    tally.trials += 1
    tally.with_three_preemptions += preemptions >= 3
    tally.needles_preempted += outputs[hidden].metrics.num_preemptions > 0
    tally.preemptions += preemptions
    tally.swaps += after.num_swaps - before.num_swaps
    tally.hit_tokens += after.prefix_cache.num_hit_tokens - before.prefix_cache.num_hit_tokens
    if bits(outputs[hidden]) != wanted:
        tally.mismatches += 1
        tally.failed.append(number)


def run_trials(count: int, *, deterministic: bool = True, models: tuple[str, ...] = MODELS, first: int = 0) -> Tally:
    """Run ``count`` trials, shared out over the models."""
    tally = Tally()
    for place, stand in enumerate(stands(models, deterministic=deterministic)):
        for number in range(first + place, first + count, len(models)):
            run_trial(stand, number, tally)
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{tally.trials}/{count} trials, {tally.mismatches} mismatches ")
    return tally


def main() -> int:
    """Print the figures; fail if a deterministic trial does not match, or too little happened in them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial: each is drawn from its number")
    parser.add_argument("--default-mode", action="store_true", help="without deterministic=True: how many differ")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tiny products: a thread that spins costs more than it saves
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    tally = run_trials(args.trials, deterministic=not args.default_mode, first=args.first)
    print(json.dumps(attrs.asdict(tally) | {"seconds": round(time.perf_counter() - started)}))
    enough = 3 * tally.with_three_preemptions >= tally.trials
    return 0 if args.default_mode or (enough and not tally.mismatches) else 1


if __name__ == "__main__":
    raise SystemExit(main())
