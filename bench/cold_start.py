"""How long ``folo generate`` takes from a cold start to its first token, beside a script that only reads the weights.

``python bench/cold_start.py [--rounds N] [--breakdown] [--json] [--model MODEL]``. Both run as fresh processes by
turns, and both are timed from outside: from the start of the process to the first characters that come through its
terminal. Files are in the page cache, the GGUF file is converted, and one start of Folo comes before the first round,
so that what Folo remembers between starts is there.

The script imports torch, opens the same safetensors with ``safetensors.torch.load_file`` and prints a letter. It runs
in two forms: ``mapped`` touches every page of the mapped file, ``read`` copies every tensor into memory of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "The capital of France is"
READER = """
import sys, torch
from safetensors.torch import load_file
tensors = {}
for file in sys.argv[2:]:
    tensors.update(load_file(file))
if sys.argv[1] == "read":
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
else:
    for tensor in tensors.values():
        tensor.view(-1)[:: 4096 // tensor.element_size()].sum()
print("x", flush=True)
"""
SPANS = {
    "plugins found and imported": ("folo_core.plugins.manager", "load_registry"),
    "GGUF file known again": ("folo_hf.loader", "converted"),
    "configuration": ("folo_hf.loader", "load_config"),
    "class found and judged": ("folo_hf.loader", "screen"),
    "weight files checked": ("folo_hf.loader", "check_weights"),
    "tokenizer": ("folo_hf.loader", "load_tokenizer"),
    "module built, weights mapped": ("folo_hf.loader", "_load_module"),
    "weights laid out (passes)": ("folo_hf.loader", "run_passes"),
    "probe": ("folo_hf.loader", "probe"),
    "native layers": ("folo_hf.loader", "native_decoder"),
    "KV pool sized": ("folo_core.plugins.assembly", "_size_cache"),
    "first step": ("folo_core.execution.model_runner", "ModelRunner.run"),
}
"""Functions that the breakdown times, by what they do."""


def first_output(command: list[str]) -> float:
    """Seconds from the start of a process to its first characters on the terminal; waits for its end."""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=theirs, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    os.close(theirs)
    first = b""
    seconds = 0.0
    with contextlib.suppress(OSError):  # a terminal whose other end is closed
        first = os.read(ours, 1)
        seconds = time.perf_counter() - start
        while os.read(ours, 4096):
            pass
    os.close(ours)
    _, errors = process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"{command}: status {process.returncode}\n{errors.decode()}")
    return seconds


def folo(model: str) -> list[str]:
    """The command under test."""
    main = "from folo_core.cli.main import main; main()"
    return [sys.executable, "-c", main, "generate", PROMPT, "--model", model, "--max-tokens", "2"]


def weights(model: str) -> list[str]:
    """The safetensors files that Folo reads for the model; also the start that fills what Folo remembers."""
    import torch

    from folo_core.plugins.manager import load_registry
    from folo_hf.device import TorchProbe, resolve_device, resolve_dtype
    from folo_hf.gguf import converted
    from folo_hf.source import Kind, locate, weight_files

    first_output(folo(model))
    aliases = {part.name: part for part in load_registry().all("model_aliases")}
    source = locate(str(aliases[model].build()) if model in aliases else model)
    hardware = TorchProbe()
    dtype = getattr(torch, resolve_dtype("auto", resolve_device("auto", hardware), hardware))
    folder = source.path if source.kind is Kind.FOLDER else converted(source.path, dtype)
    return [str(file) for file in weight_files(folder)]


def compare(model: str, rounds: int) -> dict[str, list[float]]:
    """Time all three commands by turns."""
    files = weights(model)
    commands = {
        "mapped": [sys.executable, "-c", READER, "mapped", *files],
        "read": [sys.executable, "-c", READER, "read", *files],
        "folo": folo(model),
    }
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            samples[name].append(first_output(command))
    return samples


def breakdown(model: str) -> dict[str, float]:
    """Seconds of each part of one start, in a fresh process, and of the imports that take longest."""
    command = [sys.executable, "-X", "importtime", __file__, "--spans", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    lines = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| (\s*)(\S+)$", done.stderr, re.MULTILINE)
    slow = sorted(((int(total), name) for total, _, name in lines), reverse=True)[:12]
    return parts | {f"  -X importtime {name}": total / 1e6 for total, name in slow}


def spans(model: str) -> dict[str, float]:
    """Start Folo in this process and time its parts."""
    from folo_cli.options import PROCESS_DEFAULTS
    from folo_hf import lean

    found: dict[str, float] = {}

    def timed(label: str, module: str, path: str) -> None:
        owner: object = importlib.import_module(module)
        *holders, name = path.split(".")
        for holder in holders:
            owner = getattr(owner, holder)
        function = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                found.setdefault(label, time.perf_counter() - start)

        setattr(owner, name, call)

    for name, value in PROCESS_DEFAULTS.items():
        os.environ.setdefault(name, value)
    gc.disable()
    imports: dict[str, Callable[[], object]] = {
        "folo_core.llm": lambda: importlib.import_module("folo_core.llm"),
        "torch": lean.install,
        "folo_hf.loader": lambda: importlib.import_module("folo_hf.loader"),
    }
    # One after the other, so that each line shows what it adds to those before.
    for name, work in imports.items():
        start = time.perf_counter()
        work()
        found[f"import {name}"] = time.perf_counter() - start
    for label, (module, path) in SPANS.items():
        timed(label, module, path)
    sys.argv = ["folo", *folo(model)[3:]]
    from folo_core.cli.main import main as run

    with contextlib.suppress(SystemExit):
        run()
    return found


def show(samples: dict[str, list[float]]) -> dict[str, float]:
    """Print medians and ratios."""
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        print(f"{name:<8} median {medians[name]:6.2f} s   best {min(values):6.2f} s   of {len(values)}")
    result = dict(medians)
    for name in ("mapped", "read"):
        pairs = [ours / theirs for ours, theirs in zip(samples["folo"], samples[name], strict=True)]
        result[f"folo / {name}"] = statistics.median(pairs)
        best = min(samples["folo"]) / min(samples[name])
        print(f"folo / {name:<8} median of rounds {statistics.median(pairs):.2f}   of the best times {best:.2f}")
    return result


def main() -> None:
    """Compare, and show where the time goes if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--breakdown", action="store_true", help="also where one start spends its time")
    parser.add_argument("--json", action="store_true", help="print all samples as one line of JSON at the end")
    parser.add_argument("--spans", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.spans:
        print(json.dumps(spans(options.model)))
        return
    samples = compare(options.model, options.rounds)
    result: dict[str, object] = {"samples": samples, "result": show(samples)}
    if options.breakdown:
        result["breakdown"] = parts = breakdown(options.model)
        for name, seconds in parts.items():
            print(f"{name:<45} {seconds:7.3f} s")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
