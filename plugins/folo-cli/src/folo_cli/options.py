"""Options that several subcommands share, and what they turn into."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from folo_core.llm import LLM
    from folo_core.sampling_params import SamplingParams

Model = Annotated[str, typer.Option("--model", "-m", help="demo, a folder, a GGUF file or a hub id.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Keep tokens this likely relative to the best; 0 is off.")]
Seed = Annotated[int | None, typer.Option(help="Fixes the random choices.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")]
Strategy = Annotated[
    str | None, typer.Option("--strategy", help="A sampler's name, such as beam; `folo plugins list` has them.")
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-O", metavar="FIELD=VALUE", help="Set a field of the strategy's parameters; may be repeated."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Quantization = Annotated[str | None, typer.Option(help="int8, int4 or fp8: round the weights, to read fewer bytes.")]
KVCacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto, or fp8: keep keys and values in float8, on CUDA devices.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")]

PROCESS_DEFAULTS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "FOLO_LEAN_START": "1",
}
"""Set before the libraries that read them are imported, unless the user has."""


def open_model(model: str, **options: Any) -> LLM:  # noqa: ANN401 (engine options)
    """Load a model quietly, since progress belongs to Folo, and soon, since the command's process does nothing else."""
    with _defaults(PROCESS_DEFAULTS), _no_collections():
        from folo_core.llm import LLM

        return LLM(model, **{name: value for name, value in options.items() if value is not None})


@contextmanager
def _defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in a block, but for those that the user has set."""
    missing = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the collector from walking, again and again, the modules and weights that are there to stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()


def sampling_params(**fields: Any) -> SamplingParams:  # noqa: ANN401 (SamplingParams judges them)
    """Build plain parameters from command-line options; what was not given keeps its default."""
    from folo_core.sampling_params import SamplingParams

    return SamplingParams(**{name: value for name, value in fields.items() if value is not None})


def strategy_params(strategy: str | None, options: list[str] | None, **flags: Any) -> SamplingParams:  # noqa: ANN401 (as above)
    """Build the parameters of a strategy chosen by name, or plain ones, from ``FIELD=VALUE`` options and flags."""
    from folo_core.plugins.strategies import params_from_options

    return params_from_options(strategy, options or [], flags)
