"""Beam search by folo-beam, by transformers and by CTranslate2; and what a beam step costs beside a plain one.

All run the demo model in float32 on the CPU from the same weights: eight prompts of 64 token ids at once, width 4,
64 new tokens each, end-of-sequence tokens ignored. A rate counts the tokens that are kept: the best answer's.
Each contestant has a process of its own, with the thread binding that a trial round found to suit it best, and they
work in turns, so that a slow minute of the machine meets all of them. CTranslate2 takes part if it is installed
(``pip install --no-deps ctranslate2==4.8.5``); its model is converted into a temporary folder first.

``--step-cost`` measures instead, step by step in turns in one process, a step of 8 searches of width 4 against a
greedy step of 32 requests whose answers are as long.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Answers = list[list[int]]

BINDINGS = ("true", "false", "close")
FIELDS = ("prompts", "prompt", "new", "width", "threads")


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    """Return fixed prompts of ordinary token ids."""
    return [[1000 + ((i + 131 * n) * 7919) % 30_000 for i in range(args.prompt)] for n in range(args.prompts)]


def weights() -> str:
    """Return the folder of the demo model's safetensors."""
    import torch

    from folo_demo_model.plugin import demo_model
    from folo_hf.gguf import converted

    return str(converted(demo_model(), torch.float32))


def folo(args: argparse.Namespace) -> Callable[[], Answers]:
    """Return what answers all prompts with Folo."""
    from folo_beam import BeamParams
    from folo_core import LLM

    llm = LLM(
        "demo", dtype="float32", max_model_len=args.prompt + args.new, max_num_seqs=args.prompts * args.width,
        max_num_batched_tokens=max(2048, args.prompts * args.prompt),
    )  # fmt: skip
    params = BeamParams(width=args.width, max_tokens=args.new, ignore_eos=True, detokenize=False)
    prompts = prompt_ids(args)
    return lambda: [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def transformers(args: argparse.Namespace) -> Callable[[], Answers]:
    """Return what answers all prompts with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(weights(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt_ids(args))

    def generate() -> Answers:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=args.width, pad_token_id=0,
            max_new_tokens=args.new,
        )  # fmt: skip
        found: Answers = output[:, args.prompt :].tolist()
        return found

    return generate


def ctranslate2(args: argparse.Namespace) -> Callable[[], Answers]:
    """Return what answers all prompts with CTranslate2."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(weights())
    prompts = [tokenizer.convert_ids_to_tokens(ids) for ids in prompt_ids(args)]
    generator = importlib.import_module("ctranslate2").Generator(
        args.folder, device="cpu", compute_type="float32", inter_threads=1, intra_threads=args.threads
    )

    def generate() -> Answers:
        results = generator.generate_batch(
            prompts, beam_size=args.width, min_length=args.new, max_length=args.new, include_prompt_in_result=False,
            length_penalty=1.0,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in results]

    return generate


MAKERS = {"folo": folo, "transformers": transformers, "ctranslate2": ctranslate2}


def convert(folder: str) -> str | None:
    """Convert the demo model for CTranslate2 into ``folder``; return why that cannot be, or None."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "not installed: pip install --no-deps ctranslate2==4.8.5"
    try:
        converters = importlib.import_module("ctranslate2.converters")
        converters.TransformersConverter(weights()).convert(folder, force=True)
    except Exception as error:  # noqa: BLE001 (whatever keeps a peer away is reported)
        return f"its converter failed: {type(error).__name__}: {error}"
    return None


def work(args: argparse.Namespace) -> None:
    """Be one contestant: answer each line that comes in with the seconds a round took, and the answers."""
    import torch

    torch.set_num_threads(args.threads)
    generate = MAKERS[args.worker](args)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        answers = generate()
        seconds = time.perf_counter() - start
        assert [len(answer) for answer in answers] == [args.new] * args.prompts
        print(json.dumps([seconds, answers]), flush=True)


class Contestant:
    """A process that runs one of the contestants when it is told to."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str, binding: str) -> None:
        self.binding = binding
        sizes = [f"--{field}={getattr(args, field)}" for field in FIELDS]
        threads = {"OMP_NUM_THREADS": str(args.threads), "OMP_PROC_BIND": binding, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", f"--folder={folder}", *sizes],
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("ready")

    def run(self) -> tuple[float, Answers]:
        """Return the seconds of one round, and its answers."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        seconds, answers = json.loads(self._read("["))
        return seconds, answers

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries may print before
            if line.startswith(start):
                return line
        message = f"the process ended with status {self.process.wait()}"
        raise RuntimeError(message)


def fastest(name: str, args: argparse.Namespace, folder: str) -> Contestant:
    """Return the contestant with the binding that suits it best, warmed up."""
    tried: list[tuple[float, Contestant]] = []
    for binding in args.bindings.split(","):
        contestant = Contestant(name, args, folder, binding)
        contestant.run()
        seconds, _ = contestant.run()
        tried.append((seconds, contestant))
    _, best = min(tried, key=lambda pair: pair[0])
    for _, contestant in tried:
        if contestant is not best:
            contestant.close()
    return best


def race(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run all rounds, the contestants in turns, and return seconds, medians, spread and ratios."""
    reason = convert(folder)
    names = [name for name in MAKERS if name != "ctranslate2" or reason is None]
    running = {name: fastest(name, args, folder) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, Answers] = {}
    for number in range(args.rounds):
        for name in names if number % 2 else names[::-1]:
            seconds, answers[name] = running[name].run()
            times[name].append(seconds)
    for contestant in running.values():
        contestant.close()
    medians = {name: statistics.median(found) for name, found in times.items()}
    kept = args.prompts * args.new
    return {
        "skipped": {} if reason is None else {"ctranslate2": reason},
        "binding": {name: contestant.binding for name, contestant in running.items()},
        "seconds": times,
        "tokens_per_s": {name: kept / median for name, median in medians.items()},
        "spread": {name: (max(found) - min(found)) / medians[name] for name, found in times.items()},
        "ratio": {name: medians[name] / medians["folo"] for name in names},
        "ratio_by_round": {
            name: [theirs / ours for ours, theirs in zip(times["folo"], times[name], strict=True)] for name in names
        },
        "same_answers": {
            name: sum(a == b for a, b in zip(answers["folo"], answers[name], strict=True)) for name in names
        },
    }


def step_cost(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of beam steps and of greedy steps of as many rows at the same lengths, taken in turns."""
    import torch

    from folo_beam import BeamParams
    from folo_core import LLM, SamplingParams

    torch.set_num_threads(args.threads)
    rows = args.prompts * args.width
    common: dict[str, Any] = {"max_tokens": args.new, "ignore_eos": True, "detokenize": False}
    kinds: dict[str, tuple[SamplingParams, int]] = {
        "beam": (BeamParams(width=args.width, **common), 1),
        "greedy": (SamplingParams(temperature=0.0, **common), args.width),
    }
    engines: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for name, (params, copies) in kinds.items():
        llm = LLM(
            "demo", dtype="float32", max_model_len=args.prompt + args.new, max_num_seqs=rows,
            max_num_batched_tokens=rows * args.prompt, num_blocks=rows * ((args.prompt + args.new) // 16 + 3),
        )  # fmt: skip
        engines[name] = llm.engine
        for number, prompt in enumerate(prompt_ids(args)):
            for copy in range(copies):
                llm.engine.add_request(f"{number}-{copy}", prompt, params)
        llm.engine.step()
    for number in range(args.new - 2):
        for name in list(engines) if number % 2 else list(engines)[::-1]:
            live = [sequence for request in engines[name].requests.values() for sequence in request.live]
            assert len(live) == rows
            assert {len(sequence.data.output_token_ids) for sequence in live} == {number + 1}
            start = time.perf_counter()
            engines[name].step()
            times[name].append(time.perf_counter() - start)
    ratios = sorted(beam / plain for beam, plain in zip(times["beam"], times["greedy"], strict=True))
    medians = {name: statistics.median(found) for name, found in times.items()}
    quarter = len(ratios) // 4
    return {
        "rows": rows,
        "median_s": medians,
        "ratio": medians["beam"] / medians["greedy"],
        "ratio_by_step": {"median": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]]},
    }


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts at once (default 8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each answer (default 64)")
    parser.add_argument("--width", type=int, default=4, help="beams of each search (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (default 2)")
    bindings = ",".join(BINDINGS)
    parser.add_argument("--bindings", default=bindings, help=f"values of OMP_PROC_BIND to try (default {bindings})")
    parser.add_argument("--step-cost", action="store_true", help="measure a beam step against a greedy one instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def show_step_cost(found: dict[str, Any]) -> None:
    """Print the medians and their ratio."""
    low, high = found["ratio_by_step"]["quartiles"]
    for name, median in found["median_s"].items():
        print(f"{name:<8} step of {found['rows']} rows: median {median * 1e3:7.2f} ms")
    print(f"a beam step costs {found['ratio']:.3f} plain ones (step by step: quartiles {low:.3f} to {high:.3f})")


def show_race(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print rates, spread and ratios."""
    print(
        f"{args.prompts} prompts of {args.prompt} tokens, width {args.width}, {args.new} new tokens; {args.threads} "
        f"threads, {args.rounds} rounds in turns"
    )
    for name, rate in found["tokens_per_s"].items():
        rounds = found["ratio_by_round"][name]
        print(
            f"{name:<13} {rate:7.1f} kept tokens/s   spread {found['spread'][name]:5.1%}   binding "
            f"{found['binding'][name]:<6} Folo is {found['ratio'][name]:.2f} times as fast "
            f"({min(rounds):.2f} to {max(rounds):.2f})   same answers {found['same_answers'][name]}/{args.prompts}"
        )
    for name, reason in found["skipped"].items():
        print(f"{name:<13} skipped: {reason}")


def main() -> None:
    """Print rates and ratios, or the cost of a step, or either as JSON."""
    args = parse()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = step_cost(args) if args.step_cost else race(args, folder)
    if args.json:
        print(json.dumps({"settings": vars(args), "results": found}, indent=2))
    elif args.step_cost:
        show_step_cost(found)
    else:
        show_race(args, found)


if __name__ == "__main__":
    main()
