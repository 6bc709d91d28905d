"""``folo generate``: complete prompts from the command line, a file or a pipe."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from folo_cli import options
from folo_core.errors import RequestError

if TYPE_CHECKING:
    from folo_core.llm import LLM
    from folo_core.outputs import RequestOutput
    from folo_core.sampling_params import SamplingParams

app = typer.Typer()


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none, or '-', reads one from stdin.")] = None,
    model: options.Model = "demo",
    max_tokens: options.MaxTokens = 128,
    strategy: options.Strategy = None,
    fields: options.Fields = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, as without it.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; 1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the best; 0 is off.")] = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    max_model_len: options.MaxModelLen = None,
    prompts_file: Annotated[Path | None, typer.Option("--file", "-f", help="One prompt a line.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines here.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per prompt as it finishes.")] = False,
    stats: Annotated[bool, typer.Option(help="Tell tokens per second on stderr.")] = True,
) -> None:
    """Complete prompts. One answer streams as text; several, --json or --output give a JSON line for each prompt."""
    texts = _collect_prompts(prompts, prompts_file)
    flags = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed, "stop": stop}
    params = options.strategy_params(strategy, fields, max_tokens=max_tokens, **flags)
    sink = None if output is None else output.open("w", encoding="utf-8")
    try:
        llm = options.open_model(
            model,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
        )
        inputs = [llm.apply_chat_template([{"role": "user", "content": t}]) if chat else t for t in texts]
        started = time.perf_counter()
        if len(texts) == params.n == 1 and sink is None and not as_json:
            tokens = _stream_text(llm, inputs[0], params)
        else:
            tokens = _write_lines(llm, inputs, params, sink or sys.stdout)
        _tell_speed(tokens, time.perf_counter() - started, enabled=stats)
    finally:
        if sink is not None:
            sink.close()


def _collect_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    texts = [] if prompts is None else [text for text in prompts if text != "-"]
    if file is not None:
        texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif not prompts or "-" in prompts:
        if sys.stdin.isatty() and not prompts:
            message = "prompts: give one as an argument, with --file, or through a pipe"
            raise RequestError(message)
        texts.append(sys.stdin.read().rstrip("\n"))
    return texts


def _stream_text(llm: LLM, prompt: str | dict[str, object], params: SamplingParams) -> int:
    """Print one answer as it grows; Ctrl-C keeps what is there and exits with 130."""
    tokens = 0
    try:
        for out in llm.stream(prompt, params):
            completion = out.outputs[0]
            tokens += len(completion.token_ids)
            sys.stdout.write(completion.text)
            sys.stdout.flush()
            if out.error is not None:
                raise out.error
    finally:
        if sys.exc_info()[0] is not BrokenPipeError:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return tokens


def _write_lines(llm: LLM, prompts: list[str | dict[str, object]], params: SamplingParams, sink: TextIO) -> int:
    """Write each answer as soon as it is finished, so that an interruption keeps the finished ones."""
    tokens = 0
    for number, out in llm.generate_as_finished(prompts, params):
        tokens += sum(len(completion.token_ids) for completion in out.outputs)
        sink.write(json.dumps(_record(number, out), ensure_ascii=False) + "\n")
        sink.flush()
    return tokens


def _record(number: int, out: RequestOutput) -> dict[str, object]:
    return {
        "index": number,
        "prompt": out.prompt,
        "num_prompt_tokens": len(out.prompt_token_ids),
        "outputs": [
            {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                **({} if completion.score is None else {"score": completion.score}),
            }
            for completion in out.outputs
        ],
        "error": None if out.error is None else str(out.error),
    }


def _tell_speed(tokens: int, seconds: float, *, enabled: bool) -> None:
    if enabled and seconds > 0:
        sys.stderr.write(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s\n")
