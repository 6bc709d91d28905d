"""What n-gram speculation saves on text that repeats its prompt, and what it costs on text that does not.

The demo model answers eight chat prompts that ask for a given paragraph again, word for word or lightly edited, and
eight that ask for something new. Each set is answered one prompt at a time and all at once, with and without
speculation in turns, greedily. The tokens are asserted to be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from folo_core import LLM, SamplingParams
from folo_speculative import SpeculativeParams

PARAGRAPHS = """\
The lighthouse at Grey Point was built in 1847 by a company of stonemasons from the mainland. It stands forty metres
above the sea, and its lamp can be seen from a distance of thirty kilometres. For more than a century a keeper lived
in the small white house beside the tower, and he wrote down every ship that passed.

To make the bread, mix five hundred grams of flour with ten grams of salt and seven grams of dry yeast. Add three
hundred and fifty millilitres of warm water and knead the dough for ten minutes. Let it rest for two hours under a
damp cloth, shape it into a loaf, and bake it at two hundred and thirty degrees.

The annual meeting of the society will be held on Thursday, 12 March, at six o'clock in the evening in the reading
room of the town library. Members are asked to bring their cards. The treasurer will present the accounts, and the
committee will propose a new rule about the lending of maps and instruments.

A heat pump moves heat from a cold place to a warm one, as a refrigerator does. It uses electricity to compress a gas,
which becomes hot and gives its heat to the water of the radiators. When the gas expands again it becomes cold, and
takes up heat from the air outside, even on a frosty day in winter.
"""
TEXTS = [paragraph.replace("\n", " ").strip() for paragraph in PARAGRAPHS.split("\n\n")]
TASKS = ("Repeat the following text exactly:\n\n{}", "Please proofread and return this text:\n\n{}")
REPEATING = [task.format(paragraph) for task in TASKS for paragraph in TEXTS]
SETS = ("repeating", "free")
FREE = [
    "Write a short story about a dog that learns to swim.",
    "Explain why the sky is blue.",
    "What should I see in Lisbon in two days?",
    "Write a letter to a friend about a journey by train.",
    "How does a bicycle stay upright?",
    "Describe the life of a bee.",
    "Give me advice for a first job interview.",
    "Tell me about the history of paper.",
]


def answer(llm: LLM, prompts: list[str], params: SamplingParams, at_once: int) -> tuple[float, list[Any]]:
    """Return the seconds that all answers took, and the outputs."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    start = time.perf_counter()
    outputs = []
    for first in range(0, len(chats), at_once):
        outputs += llm.chat(chats[first : first + at_once], params)
    return time.perf_counter() - start, outputs


def compare(llm: LLM, prompts: list[str], at_once: int, args: argparse.Namespace) -> dict[str, float]:
    """Answer with and without speculation in turns."""
    plain = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    own = {} if args.num_draft_tokens is None else {"num_draft_tokens": args.num_draft_tokens}
    guessing = SpeculativeParams(temperature=0, max_tokens=args.max_tokens, **own)
    seconds: dict[str, list[float]] = {"plain": [], "speculative": []}
    drafted = accepted = tokens = 0
    for _ in range(args.rounds):
        before, expected = answer(llm, prompts, plain, at_once)
        after, found = answer(llm, prompts, guessing, at_once)
        for one, other in zip(expected, found, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids, "speculation changed a token"
        seconds["plain"].append(before)
        seconds["speculative"].append(after)
        drafted = sum(output.metrics.num_draft_tokens for output in found)
        accepted = sum(output.metrics.num_accepted_tokens for output in found)
        tokens = sum(len(output.outputs[0].token_ids) for output in found)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "plain_s": median["plain"],
        "speculative_s": median["speculative"],
        "ratio": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "tokens": tokens,
        "drafted": drafted,
        "accepted": accepted,
    }


def main() -> None:
    """Print one line per case, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="model to measure (default demo)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer (default 128)")
    parser.add_argument("--num-draft-tokens", type=int, help="most tokens drafted at a time (default the plugin's)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="sets of prompts (default both)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default all)")
    parser.add_argument("--json", action="store_true", help="print JSON, times in seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(args.model, dtype="float32", max_model_len=1024, max_num_seqs=8)
    for params in (SamplingParams(temperature=0, max_tokens=8), SpeculativeParams(temperature=0, max_tokens=8)):
        answer(llm, REPEATING[:2], params, 2)  # warms up
    results = {
        f"{name}, {at_once} at once": compare(llm, {"repeating": REPEATING, "free": FREE}[name], at_once, args)
        for name in args.sets
        for at_once in (1, 8)
    }
    assert all(result["accepted"] > 0 for name, result in results.items() if "repeating" in name)
    if args.json:
        print(json.dumps({"settings": vars(args), "results": results}, indent=2))
        return
    print(f"{args.model}, {args.threads} threads, {len(REPEATING)} prompts, medians of {args.rounds} rounds")
    for name, result in results.items():
        rate = result["accepted"] / max(result["drafted"], 1)
        print(
            f"{name:<22} plain {result['plain_s']:7.2f} s   speculative {result['speculative_s']:7.2f} s   "
            f"ratio {result['ratio']:5.2f}   {result['tokens']} tokens, {result['drafted']} drafted, {rate:.0%} kept"
        )


if __name__ == "__main__":
    main()
