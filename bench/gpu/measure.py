"""Runs workloads through an engine and times them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs

from folo_core import LLM, SamplingParams
from folo_core.config import EngineConfig
from folo_core.plugins.manager import load_registry

if TYPE_CHECKING:
    from pathlib import Path

    from folo_core.outputs import RequestOutput
    from gpu_workloads import Workload
    from shapes import Shape


@attrs.frozen(kw_only=True)
class Sample:
    """One timed run."""

    key: str
    """The line of the table that it belongs to."""
    seconds: float
    """From the prompts to the last token."""
    tokens: int
    first: float | None = None
    """Seconds to the first token, of a request that is alone."""


def open_engine(shape: Shape, folder: Path, device: str, options: dict[str, Any]) -> LLM:
    """Start an engine with random weights on the device."""
    import random_weights

    given: dict[str, Any] = {"max_model_len": shape.max_model_len, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    given |= {"skip_tokenizer_init": True, "loader": "random", "device": device} | options
    config = EngineConfig.from_options(model=str(folder), **given)
    return LLM.from_config(config, load_registry(extra=[random_weights]))


def params_of(workload: Workload) -> list[SamplingParams]:
    """Return the parameters of each request."""
    common: dict[str, Any] = {"ignore_eos": True, "detokenize": False} | workload.sampling
    if workload.kind == "beam":
        from folo_beam import BeamParams

        width = workload.width
        return [
            BeamParams(width=width, length_penalty=1.0, early_stopping=False, max_tokens=new, **common)
            for new in workload.new
        ]
    answers = workload.width if workload.kind == "samples" else 1
    return [SamplingParams(n=answers, max_tokens=new, **common) for new in workload.new]


def run(llm: LLM, workload: Workload) -> list[Sample]:
    """Send a workload's requests once; with prefix caching a second time, when their prompts are known."""
    if workload.kind == "single":
        return [_stream(llm, workload)]
    if workload.kind != "prefix":
        return [_batch(llm, workload, workload.key)]
    llm.reset_prefix_cache()
    return [_batch(llm, workload, f"{workload.key} {which}") for which in ("cold", "second")]


def _batch(llm: LLM, workload: Workload, key: str) -> Sample:
    params = params_of(workload)
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    check_lengths(workload, outputs)
    return Sample(key=key, seconds=seconds, tokens=workload.tokens)


def _stream(llm: LLM, workload: Workload) -> Sample:
    """Time one request, and its first token apart: the rest is what a token costs."""
    count, first = 0, 0.0
    start = time.perf_counter()
    for output in llm.stream(workload.prompts[0], params_of(workload)[0]):
        if count == 0 and output.outputs and output.outputs[0].token_ids:
            first = time.perf_counter() - start
        count += sum(len(answer.token_ids) for answer in output.outputs)
    seconds = time.perf_counter() - start
    if count != workload.tokens:
        raise SystemExit(f"{workload.key}: {count} tokens came of {workload.tokens}")
    return Sample(key=workload.key, seconds=seconds, tokens=count, first=first)


def check_lengths(workload: Workload, outputs: list[RequestOutput]) -> None:
    """End the run if any answer is shorter than was asked: its speed would mean nothing."""
    wanted = workload.width if workload.kind == "samples" else 1
    for place, (output, new) in enumerate(zip(outputs, workload.new, strict=True)):
        lengths = [len(answer.token_ids) for answer in output.outputs]
        if lengths != [new] * wanted:
            raise SystemExit(
                f"{workload.key}: request {place} has answers of {lengths} tokens, not {wanted} of {new} "
                f"({output.outputs[0].finish_reason if output.outputs else 'no answer'})"
            )
