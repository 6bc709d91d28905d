"""``folo trace``: generate, and show what happened: one request's search tree, or a whole run in time."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from folo_core.errors import RequestError
from folo_core.plugins.strategies import params_from_options
from folo_core.sampling_params import SamplingParams
from folo_core.validation import default_of, given_fields
from folo_trace import opening, options
from folo_trace.page import render
from folo_trace.recorder import Recorder
from folo_trace.timeline import Timeline
from folo_trace.tree import build_trace
from folo_trace.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.engine.input_processor import Prompt
    from folo_core.llm import LLM

app = typer.Typer()

ALTERNATIVES = 4
"""Most likely tokens to note beside each chosen one, unless ``-O logprobs=N`` says otherwise."""


class Format(Enum):
    """What to draw."""

    TREE = "tree"
    """One request's search tree, as a page or as data."""
    PERFETTO = "perfetto"
    """Steps, requests, preemptions and swaps of a run, in the Trace Event Format."""


@attrs.frozen
class Target:
    """What to write, and where."""

    format: Format
    path: Path | None
    """None for stdout."""
    data: bool
    """Of a tree: its data in place of the page."""

    @classmethod
    def choose(cls, format_: Format | None, output: Path | None, *, as_json: bool, num_prompts: int) -> Target:
        """Follow ``--format``; without it, the name of the output; without that, the number of prompts.

        Raises:
            RequestError: there is no prompt, or a tree is asked for and there are several.
        """
        is_json = output is not None and output.suffix == ".json"
        if format_ is None:
            by_name = is_json if output is not None else num_prompts > 1
            format_ = Format.PERFETTO if by_name and not as_json else Format.TREE
        if num_prompts == 0:
            message = "prompts: none given: give some as arguments, with --file, or '-' for stdin"
            raise RequestError(message)
        if format_ is Format.TREE and num_prompts > 1:
            message = f"prompts: {num_prompts} given: a tree is of one: give one, or trace the run with -o run.json"
            raise RequestError(message)
        if output is None and not as_json:
            output = Path("trace.html" if format_ is Format.TREE else "run.json")
        return cls(format_, output, data=as_json or is_json)


@app.command()
def trace(  # noqa: PLR0913, PLR0917 (as many options as the command has)
    prompts: Annotated[list[str] | None, typer.Argument(help="What to complete; '-' reads it from stdin.")] = None,
    model: options.Model = "demo",
    strategy: options.Strategy = None,
    fields: options.Fields = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 24,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    prompts_file: options.PromptsFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,  # noqa: FBT002 (a flag)
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = None,
    max_model_len: options.MaxModelLen = None,
    block_size: options.BlockSize = None,
    num_blocks: options.NumBlocks = None,
    kv_cache_bytes: options.KVCacheBytes = None,
    swap_space: options.SwapSpace = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    policy: options.Policy = None,
    preemption: options.Preemption = None,
    enable_prefix_caching: options.PrefixCaching = False,  # noqa: FBT002 (a flag)
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="run.json gets the run; any other name, the tree's page.")
    ] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="What to write, whatever -o is called.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write data, to stdout unless -o is given.")] = False,  # noqa: FBT002 (a flag)
) -> None:
    """Generate, and draw a request's search tree (trace.html), or the whole run for Perfetto (-o run.json)."""
    texts = options.collect_prompts(prompts, prompts_file)
    target = Target.choose(format_, output, as_json=as_json, num_prompts=len(texts))
    flags = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    engine = options.engine_options(
        model=model,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=kv_cache_bytes,
        swap_space=swap_space,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        policy=policy,
        preemption=preemption,
        enable_prefix_caching=enable_prefix_caching,
    )
    watcher = Recorder() if target.format is Format.TREE else Timeline()
    registry = opening.open_registry(watcher)
    params = params_from_options(strategy, fields or [], flags, registry)
    llm = opening.open_model(registry, engine)
    if isinstance(watcher, Timeline):
        inputs = [as_chat(llm, text) if chat else text for text in texts]
        write_run(llm, watcher, inputs, params, target, model=model)
    else:
        write_tree({"model": model, **record(llm, watcher, texts[0], params, chat=chat)}, target)


def as_chat(llm: LLM, prompt: str) -> dict[str, object]:
    """Wrap a prompt in the model's chat template."""
    return llm.apply_chat_template([{"role": "user", "content": prompt}])


def record(llm: LLM, recorder: Recorder, prompt: str, params: SamplingParams, *, chat: bool = False) -> dict[str, Any]:
    """Generate once with an engine that ``recorder`` listens to, and return the trace.

    Raises:
        RequestError: the prompt cannot be served.
        FoloError: the request failed on its own.
    """
    from folo_core.config import unstructure

    given = as_chat(llm, prompt) if chat else prompt
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


def write_tree(run: dict[str, Any], target: Target) -> None:
    """Write a tree as its page or as data."""
    if target.path is None:
        sys.stdout.write(_dump(run))
        return
    target.path.write_text(_dump(run) if target.data else render(run), encoding="utf-8")
    sys.stderr.write(f"{target.path}: {_in_words(run['summary'])}\n")


def write_run(
    llm: LLM, timeline: Timeline, prompts: Sequence[Prompt], params: SamplingParams, target: Target, **about: object
) -> None:
    """Generate with an engine that ``timeline`` listens to, and write the run: also one that Ctrl-C ended."""
    num_failed = 0
    try:
        with closing(Workload.of(prompts, params).run(llm)) as outputs:
            for _, output in outputs:
                num_failed += output.error is not None
    finally:
        timeline.write(sys.stdout if target.path is None else target.path, **about)
        if target.path is not None:
            stats = llm.stats()
            failed = f" ({num_failed} failed)" if num_failed else ""
            counts = f"{stats.num_preemptions} preemptions, {stats.num_swaps} of them swaps"
            line = f"{len(prompts)} requests{failed} in {stats.num_steps} steps, {counts}"
            sys.stderr.write(f"{target.path}: {line}; open it at https://ui.perfetto.dev\n")


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
