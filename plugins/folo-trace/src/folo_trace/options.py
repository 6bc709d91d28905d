"""Options that ``folo trace`` and ``folo top`` share, and what they turn into."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from folo_core.errors import RequestError

Model = Annotated[str, typer.Option("--model", "-m", help="demo, a folder, a GGUF file or a hub id.")]
Strategy = Annotated[str | None, typer.Option(help="A sampler's name, such as beam.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="FIELD=VALUE", help="Set a field of the strategy's parameters."),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, as without it.")]
Seed = Annotated[int | None, typer.Option(help="Fixes the random choices.")]
PromptsFile = Annotated[Path | None, typer.Option("--file", "-f", help="One prompt a line.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")]
Quantization = Annotated[str | None, typer.Option(help="int8, int4 or fp8: round the weights, to read fewer bytes.")]
KVCacheDtype = Annotated[
    str | None, typer.Option("--kv-cache-dtype", help="auto, or fp8: keep keys and values in float8, on CUDA devices.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a KV block.")]
NumBlocks = Annotated[int | None, typer.Option(help="KV blocks on the device; few of them make requests yield.")]
KVCacheBytes = Annotated[
    str | None, typer.Option("--kv-cache-bytes", metavar="SIZE", help="The same, as a size: 2GiB.")
]
SwapSpace = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Host memory for swapped requests: 64MiB; a plain number is GiB.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most sequences that run at once.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Most tokens in one step.")]
Policy = Annotated[str | None, typer.Option(help="A scheduler's name: fcfs, priority, fair.")]
Preemption = Annotated[str | None, typer.Option(help="auto, recompute or swap: what becomes of a request that yields.")]
PrefixCaching = Annotated[
    bool, typer.Option("--enable-prefix-caching", help="Find beginnings that were computed before.")
]


def engine_options(**given: Any) -> dict[str, Any]:  # noqa: ANN401 (the engine's config judges them)
    """Return the engine options that a command line gives; what was not given keeps its default."""
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    if "swap_space" in options:
        with contextlib.suppress(ValueError):
            options["swap_space"] = float(options["swap_space"])  # a plain number counts GiB; text says its own unit
    return options


def collect_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Return the prompts of a command line and of a file; ``-`` stands for what stdin holds.

    Raises:
        OSError: the file cannot be read.
        RequestError: it is no text.
    """
    texts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts or []]
    if file is None:
        return texts
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        message = f"--file: {str(file)!r}: is not UTF-8 ({error.reason} at byte {error.start}): give one prompt a line"
        raise RequestError(message) from None
    return texts + [line for line in lines if line.strip()]
