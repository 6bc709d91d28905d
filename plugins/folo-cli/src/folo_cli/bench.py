"""``folo bench``: how fast Folo is, alone or against another engine over the same weights, tokens and threads.

Runs of all contestants are interleaved (A B C, A B C, ...), because a machine's speed drifts: ratios are taken
within each round, and their median is the verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import time
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from folo_core.errors import FoloError

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.execution.loading import Peer
    from folo_core.llm import LLM

app = typer.Typer(help="Measure latency and throughput, alone or against another engine.", no_args_is_help=True)

STATIC_BATCH = 8
CPUS: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
"""Cores that this process may use. Read before OpenMP binds its threads."""

Model = Annotated[str, typer.Option(help="Alias, folder, file or hub id.")]
Against = Annotated[str | None, typer.Option(help="Another engine that the model's loader can open: transformers.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are reported.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads, for every contestant alike.")]
Seed = Annotated[int, typer.Option(help="Draws prompts and lengths.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Quantization = Annotated[str | None, typer.Option(help="int8, int4 or fp8: round Folo's weights.")]
KVCacheDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="auto, or fp8: keep Folo's keys and values in it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@attrs.frozen
class Workload:
    """Requests of given lengths: greedy, end-of-sequence ignored, no text made."""

    prompts: list[list[int]]
    output_lengths: list[int]

    @classmethod
    def draw(cls, seed: int, count: int, prompt: tuple[int, int], output: tuple[int, int], vocab_size: int) -> Workload:
        """Draw ``count`` prompts of random tokens and as many output lengths, each length from an inclusive range."""
        generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)
        lengths = [generator.randint(*prompt) for _ in range(count)]
        prompts = [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]
        return cls(prompts, [generator.randint(*output) for _ in range(count)])


@attrs.frozen
class Contestant:
    """An engine with a way of using it."""

    name: str
    generate: Callable[[Workload], list[list[int]]]
    """Return the output tokens of each request."""


@attrs.define
class Measurement:
    """Seconds of each round and the cores there were, and the tokens of the last."""

    seconds: list[float] = attrs.field(factory=list)
    cores: list[float] = attrs.field(factory=list)
    tokens: list[list[int]] = attrs.field(factory=list)

    def rates(self) -> list[float]:
        """Output tokens per second in each round."""
        count = sum(map(len, self.tokens))
        return [count / seconds for seconds in self.seconds]


@app.command()
def throughput(
    model: Model = "demo",
    requests: Annotated[int, typer.Option(min=1, help="Requests, all sent at once.")] = 32,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt length, or a range of them.")] = "16-256",
    output_tokens: Annotated[str, typer.Option(help="Output length, or a range of them.")] = "16-128",
    against: Against = None,
    rounds: Rounds = 3,
    threads: Threads = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Output tokens per second of many requests at once."""
    numbers = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    llm = _open(model, numbers, threads, requests)
    ranges = _range(prompt_tokens), _range(output_tokens)
    workload = Workload.draw(seed, requests, *ranges, llm.engine.components.model_info.vocab_size)
    contestants = [Contestant("folo", lambda w: _folo(llm, w))]
    if against:
        peer = _open_peer(llm, against)
        contestants += [
            Contestant(f"{against}, one by one", lambda w: _in_batches(peer, w, 1)),
            Contestant(f"{against}, static batches of {STATIC_BATCH}", lambda w: _in_batches(peer, w, STATIC_BATCH)),
        ]
    measured = _interleave(contestants, workload, rounds)
    report = _describe(llm, workload, measured) | {
        "unit": "output tokens/s",
        "engines": {name: _summary(result.rates()) for name, result in measured.items()},
        **_compare(measured),
    }
    _print(report, as_json=as_json)


@app.command()
def latency(
    model: Model = "demo",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Output length.")] = 64,
    against: Against = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Milliseconds to the first token, and for each further token, of one request alone."""
    numbers = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    llm = _open(model, numbers, threads, 1)
    sizes = (prompt_tokens, prompt_tokens), (output_tokens, output_tokens)
    workload = Workload.draw(seed, 1, *sizes, llm.engine.components.model_info.vocab_size)
    contestants = [Contestant("folo", lambda w: _folo(llm, w))]
    if against:
        peer = _open_peer(llm, against)
        contestants.append(Contestant(against, lambda w: _in_batches(peer, w, 1)))
    first = _interleave(contestants, attrs.evolve(workload, output_lengths=[1]), rounds)
    whole = _interleave(contestants, workload, rounds)
    report = _describe(llm, workload, whole) | {"unit": "ms", "engines": {}}
    for name, result in whole.items():
        start = statistics.median(first[name].seconds)
        steps = [1e3 * (seconds - start) / (output_tokens - 1) for seconds in result.seconds]
        to_first = _summary([1e3 * seconds for seconds in first[name].seconds])
        report["engines"][name] = {"first_token": to_first, "per_token": _summary(steps)}
    _print(report | _compare(whole), as_json=as_json)


def _open(model: str, numbers: dict[str, str | None], threads: int | None, requests: int) -> LLM:
    """Load the model, to run in these numbers.

    Threads are set, and bound to cores, before torch is imported: for all contestants alike.
    """
    os.environ.setdefault("OMP_PROC_BIND", "true")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    from folo_core.llm import LLM

    return LLM(model=model, max_num_seqs=max(requests, 64), **numbers)


def _open_peer(llm: LLM, name: str) -> Peer:
    """Open the model in another engine, through a loader that can: the core itself imports no model library."""
    from folo_core.execution.loading import PeerOpener
    from folo_core.plugins.manager import load_registry

    config = llm.engine.components.config
    registry = load_registry(block=config.blocked_plugins)
    named = config.model.loader
    parts = registry.all("model_loaders") if named == "auto" else (registry.get("model_loaders", named),)
    for part in parts:
        if named != "auto" or part.spec.can_load(config.model.model):
            loader = part.build(config)
            if isinstance(loader, PeerOpener):
                return loader.open_peer(name)
    message = f"--against: {name!r}: no installed loader can open {config.model.model!r} in another engine"
    raise FoloError(message)


def _range(text: str) -> tuple[int, int]:
    """Read ``64`` or ``16-256``."""
    low, dash, high = text.partition("-")
    try:
        pair = int(low), int(high if dash else low)
    except ValueError:
        pair = (0, 0)
    if not 1 <= pair[0] <= pair[1]:
        message = f"{text!r}: write a length such as 64, or a range such as 16-256"
        raise typer.BadParameter(message)
    return pair


def _folo(llm: LLM, workload: Workload) -> list[list[int]]:
    from folo_core.sampling_params import SamplingParams

    params = [
        SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, detokenize=False)
        for length in workload.output_lengths
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def _in_batches(peer: Peer, workload: Workload, size: int) -> list[list[int]]:
    """Run batches of ``size``, sorted by output length: the order in which a static batch wastes the least."""
    order = sorted(range(len(workload.prompts)), key=workload.output_lengths.__getitem__)
    tokens: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        prompts = [workload.prompts[i] for i in chosen]
        tokens.update(zip(chosen, peer.generate(prompts, [workload.output_lengths[i] for i in chosen]), strict=True))
    return [tokens[i] for i in range(len(order))]


def _interleave(contestants: list[Contestant], workload: Workload, rounds: int) -> dict[str, Measurement]:
    """Warm every contestant up, then let each run once per round."""
    measured = {contestant.name: Measurement() for contestant in contestants}
    warm_up = Workload(workload.prompts[:2], [2] * len(workload.prompts[:2]))
    for contestant in contestants:
        contestant.generate(warm_up)
    for number in range(rounds):
        for contestant in contestants:
            cores = cores_at_hand()
            start = time.perf_counter()
            tokens = contestant.generate(workload)
            seconds = time.perf_counter() - start
            if [len(output) for output in tokens] != workload.output_lengths:
                message = f"{contestant.name} did not generate the lengths that were asked for"
                raise FoloError(message)
            measured[contestant.name].seconds.append(seconds)
            measured[contestant.name].tokens = tokens
            measured[contestant.name].cores.append(cores)
            line = f"round {number + 1}/{rounds}  {contestant.name}: {seconds:.2f} s"
            typer.echo(f"{line}  ({cores:.1f} of {len(CPUS)} cores at hand)", err=True)
    return measured


def cores_at_hand() -> float:
    """Measure how many of this process's cores others leave it now: on a shared machine fewer than it was given.

    Every core hashes the same bytes at once (which takes no interpreter lock), and one core hashes them alone.
    """
    data = bytes(8 << 20)

    def work(cpus: set[int]) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)  # of this thread: OpenMP may have bound the one that it inherits from
        hashlib.sha256(data)

    def seconds(count: int) -> float:
        threads = [Thread(target=work, args=(CPUS,)) for _ in range(count)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    alone = min(seconds(1) for _ in range(3))
    together = min(seconds(len(CPUS)) for _ in range(3))
    return min(float(len(CPUS)), len(CPUS) * alone / together)


def _describe(llm: LLM, workload: Workload, measured: dict[str, Measurement]) -> dict[str, Any]:
    """Say what was run, and where."""
    info = llm.engine.components.model_info
    return {
        "model": info.architecture,
        "parameters": info.num_parameters,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "kv_cache_dtype": info.kv_cache_dtype,
        "weight_bytes": info.weight_bytes,
        "device": info.device,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cores": len(CPUS),
        "fewest_cores_at_hand": min(cores for result in measured.values() for cores in result.cores),
        "rounds": len(next(iter(measured.values())).seconds),
        "requests": len(workload.prompts),
        "prompt_tokens": sum(map(len, workload.prompts)),
        "output_tokens": sum(workload.output_lengths),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _compare(measured: dict[str, Measurement]) -> dict[str, Any]:
    """How many times as fast as each other contestant Folo was, round by round, and how many outputs were equal."""
    ours = measured["folo"]
    others = {name: result for name, result in measured.items() if name != "folo"}
    return {
        "times_as_fast_as": {
            name: _summary([b / a for a, b in zip(ours.seconds, result.seconds, strict=True)])
            for name, result in others.items()
        },
        "requests_with_equal_tokens": {
            name: sum(a == b for a, b in zip(ours.tokens, result.tokens, strict=True))
            for name, result in others.items()
        },
    }


def _print(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        if not isinstance(value, dict):
            typer.echo(f"{key.replace('_', ' ')}: {value}")
    for key in ("engines", "times_as_fast_as", "requests_with_equal_tokens"):
        for name, value in report[key].items():
            typer.echo(f"{key.replace('_', ' ')}: {name}: {_short(value)}")


def _short(value: Any) -> str:  # noqa: ANN401 (a number, a summary or a table of summaries)
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['median']:.2f} (from {value['min']:.2f} to {value['max']:.2f})"
    return ", ".join(f"{name.replace('_', ' ')} {_short(summary)}" for name, summary in value.items())
