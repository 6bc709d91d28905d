"""``folo top``: run a workload and watch batch, queue, blocks and hit rate live."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from folo_core.errors import RequestError
from folo_core.plugins.strategies import params_from_options
from folo_trace import opening, options
from folo_trace.top import Top
from folo_trace.workload import Workload, parse_range

if TYPE_CHECKING:
    from folo_core.llm import LLM

app = typer.Typer()


@app.command()
def top(  # noqa: PLR0913, PLR0917 (as many options as the command has)
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to complete; none, and no --file: random prompts.")
    ] = None,
    model: options.Model = "demo",
    strategy: options.Strategy = None,
    fields: options.Fields = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer to a given prompt, in tokens.")] = 128,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    prompts_file: options.PromptsFile = None,
    requests: Annotated[int, typer.Option(min=1, help="How many random prompts.")] = 32,
    prompt_tokens: Annotated[str, typer.Option(help="Length of a random prompt, or a range of lengths.")] = "16-256",
    output_tokens: Annotated[str, typer.Option(help="Length of its answer, or a range of lengths.")] = "16-128",
    shared_tokens: Annotated[int, typer.Option(min=0, help="Tokens that all random prompts begin with.")] = 0,
    tenants: Annotated[int, typer.Option(min=1, help="Tenants that send the prompts, in turn.")] = 1,
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
    interval: Annotated[float | None, typer.Option(min=0, help="Seconds between two looks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line; the last is the summary.")] = False,  # noqa: FBT002 (a flag)
) -> None:
    """Run a workload and watch it: live on a terminal, else a line a second. Ctrl-C ends it with the summary."""
    texts = options.collect_prompts(prompts, prompts_file)
    if prompts_file is not None and not texts:
        message = f"--file: {str(prompts_file)!r}: holds no prompt: write one a line"
        raise RequestError(message)
    lengths = parse_range("--prompt-tokens", prompt_tokens), parse_range("--output-tokens", output_tokens)
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
    watcher = Top("json" if as_json else None, interval=interval, title=f"folo top · {model}")
    registry = opening.open_registry(watcher)
    flags = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = params_from_options(strategy, fields or [], flags, registry)
    llm = opening.open_model(registry, engine)
    if texts:
        workload = Workload.of(texts, params, tenants)
    else:
        workload = Workload.draw(
            requests,
            *lengths,
            vocab_size=llm.engine.components.model_info.vocab_size,
            seed=seed or 0,
            num_shared=shared_tokens,
            num_tenants=tenants,
        )
    watch(llm, watcher, workload)


def watch(llm: LLM, watcher: Top, workload: Workload) -> None:
    """Run the work under the watcher's eyes; stop when nobody can see it any more.

    Raises:
        OSError: what the watcher wrote to is gone.
    """
    with watcher, closing(workload.run(llm)) as outputs:
        for _ in outputs:
            if watcher.failure is not None:
                raise watcher.failure
    if watcher.failure is not None:
        raise watcher.failure
