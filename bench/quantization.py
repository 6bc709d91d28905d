"""What rounding weights, or keys and values, to 8 or 4 bits costs in quality, and saves in bytes and time.

``python bench/quantization.py [--model PATH] [--only size,quality,speed] [--json]`` loads the model in float32, int8
and int4 into one process; with ``--device cuda`` in bfloat16, fp8, int4 and with keys and values in float8 (kv-fp8),
where the size is what the loader says. ``--formats`` takes some of them.
Perplexity is taken over windows of Python's own help topics (``pydoc_data.topics``, prose and code that ship with the
standard library). Greedy answers are compared with those of the weights as they were. Speeds are told as ratios to
theirs, round by round, since a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_PROC_BIND", "true")

from pydoc_data.topics import topics

from folo_core import LLM, SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "tests" / "end_to_end"))
from prompts import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_kernels.matrix import PackedMatrix

FORMATS = {"cpu": ("float32", "int8", "int4"), "cuda": ("bfloat16", "fp8", "int4", "kv-fp8", "fp8+kv-fp8")}
"""By device: the dtype of the weights as they were, then what rounds them, or keys and values, or both."""
PARTS = ("size", "quality", "speed")
WINDOW = 1024
ROWS = 32


def open_model(name: str, device: str, kind: str) -> LLM:
    """Load the model; the device's first format is no quantisation."""
    exact = FORMATS[device][0]
    parts = kind.split("+")
    return LLM(
        name,
        dtype=exact,
        device=device,
        quantization=next((part for part in parts if part not in {exact, "kv-fp8"}), None),
        kv_cache_dtype="fp8" if "kv-fp8" in parts else "auto",
        max_model_len=WINDOW + 1,
        max_num_seqs=64,
        max_num_batched_tokens=WINDOW,
        num_blocks=1024,
    )


def matrices(llm: LLM) -> list[PackedMatrix]:
    """Return what a step multiplies by, the head last."""
    executor: Any = llm.engine.components.executor
    found: list[PackedMatrix] = executor.runner.model.matrices
    return found


def size(llm: LLM, exact: LLM) -> dict[str, Any]:
    """Compare what is stored with the weights as they were."""
    equal = differ = same = total = 0
    furthest = 0.0
    for ours, theirs in zip(matrices(llm), matrices(exact), strict=True):
        for mine, weight in zip(ours.plain(), theirs.plain(), strict=True):
            alike = mine == weight
            equal, differ = (equal + 1, differ) if alike.all() else (equal, differ + 1)
            same, total = same + int(alike.sum()), total + weight.numel()
            furthest = max(furthest, ((mine - weight).abs().max() / weight.abs().max()).item())
    info = llm.engine.components.model_info
    return {
        "step_bytes": sum(matrix.nbytes for matrix in matrices(llm)),
        "weight_bytes": info.weight_bytes,
        "head_format": matrices(llm)[-1].format.name,
        "tensors_kept_exactly": [equal, equal + differ],
        "weights_kept_exactly": same / total,
        "greatest_error_relative_to_the_tensors_greatest_weight": furthest,
    }


def windows(llm: LLM, count: int) -> tuple[list[list[int]], str]:
    """Return so many windows of the standard library's help topics, and the digest of their text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = llm.get_tokenizer().encode(text[: 8 * WINDOW * count])[: WINDOW * count]
    digest = hashlib.sha256(llm.get_tokenizer().decode(tokens).encode()).hexdigest()[:16]
    return [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)], digest


def perplexity(llm: LLM, texts: list[list[int]]) -> float:
    """Return the exponential of the mean negative log probability of every token but a window's first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    total, count = 0.0, 0
    for text in texts:
        (output,) = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
        places: list[Any] = list(output.prompt_logprobs or [])
        for token, entries in zip(text[1:], places[1:], strict=True):
            total, count = total - entries[token].logprob, count + 1
    return math.exp(total / count)


def answers(llm: LLM, max_tokens: int) -> list[list[int]]:
    """Answer the prompts greedily."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """Say how far answers go together."""
    length = len(theirs[0])
    places = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), length)
        for one, other in zip(ours, theirs, strict=True)
    ]
    parted = [place for place in places if place < length]
    return {
        "identical_answers": sum(place == length for place in places) / len(places),
        "tokens_before_the_first_difference": sum(places) / (length * len(places)),
        "median_first_difference": statistics.median(parted) if parted else None,
    }


def generate(llm: LLM, rows: int, max_tokens: int) -> float:
    """Return the seconds of one run."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [1 + row] * 8} for row in range(rows)]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def interleaved(models: dict[str, LLM], run: Callable[[LLM], float], rounds: int) -> dict[str, list[float]]:
    """Let each model run once a round."""
    for llm in models.values():
        run(llm)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, llm in models.items():
            seconds[name].append(run(llm))
    return seconds


def speed(models: dict[str, LLM], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time one stream, and a batch."""
    single = interleaved(models, lambda llm: generate(llm, 1, tokens), rounds)
    batch = interleaved(models, lambda llm: generate(llm, ROWS, tokens), rounds)
    return {
        name: {
            "ms_per_token": 1e3 * statistics.median(single[name]) / tokens,
            "single_stream_times_as_fast": times_as_fast(single, name),
            "batch_tokens_per_second": ROWS * tokens / statistics.median(batch[name]),
            "batch_times_as_fast": times_as_fast(batch, name),
        }
        for name in models
    }


def times_as_fast(seconds: dict[str, list[float]], name: str) -> float:
    """Return the median of the rounds' ratios."""
    exact = next(iter(seconds.values()))
    return statistics.median(a / b for a, b in zip(exact, seconds[name], strict=True))


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for."""
    exact_name, *others = FORMATS[options.device]
    names = [exact_name, *(name for name in others if options.formats is None or name in options.formats)]
    models = {name: open_model(options.model, options.device, name) for name in names}
    exact = next(iter(models.values()))
    results: dict[str, Any] = {name: {} for name in models}
    told: dict[str, Any] = {"model": options.model, "device": options.device, "formats": results}
    if "size" in options.only:
        for name, llm in models.items():
            info = llm.engine.components.model_info
            stored = {"weight_bytes": info.weight_bytes, "kv_bytes_per_token": info.kv_bytes_per_token}
            results[name] |= size(llm, exact) if options.device == "cpu" else stored
    if "quality" in options.only:
        texts, digest = windows(exact, options.windows)
        told["text"] = f"pydoc_data.topics of Python {sys.version.split()[0]}, sha256 {digest}"
        told["text_tokens"] = sum(map(len, texts))
        expected = answers(exact, options.answer_tokens)
        for name, llm in models.items():
            results[name]["perplexity"] = perplexity(llm, texts)
            results[name] |= agreement(answers(llm, options.answer_tokens), expected)
    if "speed" in options.only:
        for name, figures in speed(models, options.speed_tokens, options.rounds).items():
            results[name] |= figures
    return told


def show(told: dict[str, Any]) -> None:
    """Print a table: a row for each figure, a column for each format."""
    print(", ".join(f"{key}: {value}" for key, value in told.items() if key != "formats"))
    formats = told["formats"]
    print(f"{'':<56}" + "".join(f"{name:>14}" for name in formats))
    for figure in next(iter(formats.values())):
        cells = (brief(formats[name][figure]) for name in formats)
        print(f"{figure.replace('_', ' '):<56}" + "".join(f"{cell:>14}" for cell in cells))


def brief(value: object) -> str:
    """Write a figure in few characters."""
    if isinstance(value, list):
        return " of ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What quantised weights cost and save.")
    parser.add_argument("--model", default="demo", help="alias, folder, GGUF file or hub id")
    parser.add_argument("--device", choices=FORMATS, default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--formats", type=lambda text: text.split(","), help="some of the device's, beside its first")
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS, help="of size,quality,speed")
    parser.add_argument("--windows", type=int, default=10, help=f"windows of {WINDOW} tokens for the perplexity")
    parser.add_argument("--answer-tokens", type=int, default=64, help="tokens of each greedy answer")
    parser.add_argument("--speed-tokens", type=int, default=32, help="tokens of each timed answer")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of timings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    told = report(options)
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        show(told)


if __name__ == "__main__":
    main()
