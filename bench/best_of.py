"""Sixteen answers to one prompt, by folo-best-of and by transformers' num_return_sequences: speed and memory.

Both run the demo model in float32 on the CPU from the same weights, sample at temperature 1 without filters, get the
prompt as token ids, ignore the end-of-sequence token and return token ids. Each contestant has a process of its own,
with the thread binding that suits it, and the two work in turns, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CONTESTANTS = ("folo", "transformers")
BINDINGS = ("true", "false", "close", "spread")


def prompt_ids(length: int) -> list[int]:
    """Return a fixed prompt of ordinary token ids."""
    return [1000 + (i * 7919) % 30_000 for i in range(length)]


def folo(args: argparse.Namespace) -> Callable[[int], list[list[int]]]:
    """Return what generates all answers for a seed, with Folo."""
    from folo_core import LLM, SamplingParams

    room = args.prompt + args.new
    llm = LLM(
        "demo", dtype="float32", max_model_len=room, max_num_seqs=args.answers,
        max_num_batched_tokens=max(2048, args.prompt),
    )  # fmt: skip

    def generate(seed: int) -> list[list[int]]:
        params = SamplingParams(n=args.answers, seed=seed, max_tokens=args.new, ignore_eos=True, detokenize=False)
        output = llm.generate([prompt_ids(args.prompt)], params, use_tqdm=False)[0]
        return [answer.token_ids for answer in output.outputs]

    return generate


def transformers(args: argparse.Namespace) -> Callable[[int], list[list[int]]]:
    """Return what generates all answers for a seed, with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM

    from folo_demo_model.plugin import demo_model
    from folo_hf.gguf import converted

    model: Any = AutoModelForCausalLM.from_pretrained(converted(demo_model(), torch.float32), dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt_ids(args.prompt)])

    def generate(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=args.answers, max_new_tokens=args.new, pad_token_id=0,
        )  # fmt: skip
        found: list[list[int]] = output[:, args.prompt :].tolist()
        return found

    return generate


def work(args: argparse.Namespace) -> None:
    """Be one contestant: answer each seed that comes in with the seconds it took."""
    import torch

    torch.set_num_threads(args.threads)
    generate = {"folo": folo, "transformers": transformers}[args.worker](args)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        answers = generate(int(line))
        seconds = time.perf_counter() - start
        assert [len(answer) for answer in answers] == [args.new] * args.answers
        assert args.answers == 1 or len({tuple(answer) for answer in answers}) > 1
        print(json.dumps(seconds), flush=True)


class Contestant:
    """A process that runs one of the contestants when it is told to."""

    def __init__(self, name: str, args: argparse.Namespace, binding: str) -> None:
        sizes = [f"--{field}={getattr(args, field)}" for field in ("prompt", "new", "answers", "threads")]
        threads = {"OMP_NUM_THREADS": str(args.threads), "OMP_PROC_BIND": binding, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", *sizes],
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def run(self, seed: int) -> float:
        """Return the seconds of one round."""
        assert self.process.stdin is not None
        print(seed, file=self.process.stdin, flush=True)
        return float(self._expect(""))

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _expect(self, start: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line or not line.startswith(start):
            message = f"the process said {line!r}"
            raise RuntimeError(message)
        return line


def race(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, the contestants in turns, and return seconds, medians, spread and the ratio."""
    bindings = dict(zip(CONTESTANTS, (args.bind, args.peer_bind), strict=True))
    running = {name: Contestant(name, args, binding) for name, binding in bindings.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(args.rounds + 1):
        order = list(running) if number % 2 else list(running)[::-1]
        for name in order:
            seconds = running[name].run(number)
            if number:  # the first round warms up
                times[name].append(seconds)
    for contestant in running.values():
        contestant.close()
    ratios = [theirs / ours for ours, theirs in zip(times["folo"], times["transformers"], strict=True)]
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "seconds": times,
        "median_s": medians,
        "spread": {name: (max(found) - min(found)) / medians[name] for name, found in times.items()},
        "ratio": medians["transformers"] / medians["folo"],
        "ratio_by_round": ratios,
    }


def memory(prompt: int, new: int, answers: int) -> dict[str, int]:
    """Return the most blocks held at once by one request of many candidates and by as many requests of one."""
    import attrs

    from folo_core import SamplingParams
    from folo_core.engine.engine import Engine
    from folo_core.testing.fakes import FakeModel, fake_components

    params = SamplingParams(max_tokens=new, ignore_eos=True, seed=1, detokenize=False)
    asked = {"shared": [attrs.evolve(params, n=1, best_of=answers)], "separate": [params] * answers}
    room = {
        "block_size": 16,
        "num_blocks": answers * (prompt + new) // 16 + answers,
        "max_num_seqs": answers,
        "max_num_batched_tokens": answers * prompt,
    }
    peaks = {}
    for name, requests in asked.items():
        model = FakeModel(max_model_len=prompt + new)
        engine = Engine(fake_components(model, **room))
        for number, request in enumerate(requests):
            engine.add_request(str(number), [1 + i % 50 for i in range(prompt)], request)
        pool, peaks[name] = engine.state.kv.pool, 0
        while engine.has_unfinished_requests:
            engine.step()
            peaks[name] = max(peaks[name], pool.num_usable - pool.num_free)
    return peaks


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default 256; 1024 with --memory)")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each answer (default 64)")
    parser.add_argument("--answers", type=int, default=16, help="answers to the prompt (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (default 2)")
    parser.add_argument("--bind", choices=BINDINGS, default="true", help="Folo's OMP_PROC_BIND (default true)")
    parser.add_argument("--peer-bind", choices=BINDINGS, default="true", help="transformers' (default true)")
    parser.add_argument("--memory", action="store_true", help="count KV blocks instead, over a fake model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory and args.prompt == parser.get_default("prompt"):
        args.prompt = 1024
    return args


def main() -> None:
    """Print medians, spread and ratio, or the blocks held, or either as JSON."""
    args = parse()
    if args.worker:
        work(args)
        return
    sizes = f"{args.answers} answers of {args.new} tokens to a prompt of {args.prompt}"
    if args.memory:
        peaks = memory(args.prompt, args.new, args.answers)
        text = (
            f"{sizes}: at most {peaks['shared']} KV blocks of 16 tokens at once, {peaks['separate']} for as many "
            f"separate requests ({peaks['separate'] / peaks['shared']:.2f} times as many)"
        )
        print(json.dumps({"settings": vars(args), "results": peaks}, indent=2) if args.json else text)
        return
    found = race(args)
    if args.json:
        print(json.dumps({"settings": vars(args), "results": found}, indent=2))
        return
    print(f"{sizes}; {args.threads} threads, {args.rounds} rounds in turns")
    for name in CONTESTANTS:
        median, spread = found["median_s"][name], found["spread"][name]
        rate = args.answers * args.new / median
        print(f"{name:<14} median {median:6.3f} s   spread {spread:5.1%}   {rate:6.0f} tokens/s")
    low, high = min(found["ratio_by_round"]), max(found["ratio_by_round"])
    print(f"Folo is {found['ratio']:.2f} times as fast as transformers (by round: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
