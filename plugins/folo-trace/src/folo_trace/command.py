"""``folo trace``: generate once, and show what the strategy tried on the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from folo_core.plugins.strategies import params_from_options
from folo_core.sampling_params import SamplingParams
from folo_core.validation import default_of, given_fields
from folo_trace.page import render
from folo_trace.recorder import Recorder
from folo_trace.tree import build_trace

if TYPE_CHECKING:
    from folo_core.llm import LLM
    from folo_core.plugins.registry import Registry

app = typer.Typer()

ALTERNATIVES = 4
"""Most likely tokens to note beside each chosen one, unless ``-O logprobs=N`` says otherwise."""


@app.command()
def trace(  # noqa: PLR0913, PLR0917 (as many options as the command has)
    prompt: Annotated[str, typer.Argument(help="What to complete; '-' reads it from stdin.")],
    model: Annotated[str, typer.Option("--model", "-m", help="demo, a folder, a GGUF file or a hub id.")] = "demo",
    strategy: Annotated[str | None, typer.Option(help="A sampler's name, such as beam.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", metavar="FIELD=VALUE", help="Set a field of the strategy's parameters."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 24,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, as without it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the random choices.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,  # noqa: FBT002 (a flag)
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write; a name that ends in .json gets the data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write data, to stdout unless -o is given.")] = False,  # noqa: FBT002 (a flag)
) -> None:
    """Generate once and draw its search tree (to trace.html unless -o says otherwise)."""
    recorder = Recorder()
    options = {"model": model, "dtype": dtype, **({} if block_size is None else {"block_size": block_size})}
    registry = open_registry(recorder)
    flags = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = params_from_options(strategy, fields or [], flags, registry)
    llm = open_model(registry, options)
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    run = {"model": model, **record(llm, recorder, text, params, chat=chat)}
    as_json = as_json or (output is not None and output.suffix == ".json")
    if as_json and output is None:
        sys.stdout.write(_dump(run))
        return
    output = output or Path("trace.html")
    output.write_text(_dump(run) if as_json else render(run), encoding="utf-8")
    sys.stderr.write(f"{output}: {_in_words(run['summary'])}\n")


def open_registry(recorder: Recorder) -> Registry:
    """Load the installed plugins and the recorder."""
    from folo_core.plugins.manager import load_registry

    return load_registry(extra=[recorder])


def open_model(registry: Registry, options: dict[str, Any]) -> LLM:
    """Load a model quietly: what model libraries have to tell is of no use here."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from folo_core.config import EngineConfig
    from folo_core.llm import LLM

    return LLM.from_config(EngineConfig.from_options(**options), registry)


def record(llm: LLM, recorder: Recorder, prompt: str, params: SamplingParams, *, chat: bool = False) -> dict[str, Any]:
    """Generate once with an engine that ``recorder`` listens to, and return the trace.

    Raises:
        RequestError: the prompt cannot be served.
        FoloError: the request failed on its own.
    """
    from folo_core.config import unstructure

    given = llm.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    (output,) = llm.generate(given, _with_alternatives(params), use_tqdm=False)
    if output.error is not None:
        raise output.error
    parts = llm.engine.components
    about = {
        "strategy": parts.sampler_for(params),
        "params": {name: value for name, value in unstructure(params).items() if name in _given(params)},
    }
    block_size = parts.config.cache.block_size
    return build_trace(recorder.records[output.request_id], output, parts.tokenizer, block_size=block_size, about=about)


def _given(params: SamplingParams) -> set[str]:
    """Name the fields that differ from their defaults, and those that are the strategy's own."""
    common = {field.name for field in given_fields(SamplingParams)}
    fields = [f for f in given_fields(type(params)) if f.name not in common or getattr(params, f.name) != default_of(f)]
    return {field.alias or field.name for field in fields}


def _with_alternatives(params: SamplingParams) -> SamplingParams:
    return params if params.logprobs is not None else attrs.evolve(params, logprobs=ALTERNATIVES)


def _dump(run: dict[str, Any]) -> str:
    return json.dumps(run, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _in_words(summary: dict[str, int]) -> str:
    return (
        f"{summary['steps']} steps, {summary['tokens']} tokens sampled and {summary['tokens_kept']} kept; "
        f"{summary['peak_blocks']} blocks at the peak, where separate requests take {summary['peak_blocks_separate']}"
    )
