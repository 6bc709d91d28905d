"""Where a step's time goes: a table of prompt steps and one of decode steps, beside what the machine does at best.

The workload runs twice in one engine. The first run is timed by the clock alone; the second one under torch's
profiler, which slows it down, and only the shares of the operators are taken from it. A model that counts its own
seconds (``stage_seconds()``, name to seconds so far) is asked instead of the profiler. ``--trace FILE`` writes what
happened when, for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from folo_core import LLM, SamplingParams
from folo_core.config import EngineConfig
from folo_core.plugins.manager import load_registry
from folo_trace.timeline import Timeline
from stages import STAGES, Stages

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine

LINEARS = {"aten::linear", "aten::addmm", "aten::mm", "aten::matmul", "aten::bmm", "mkldnn::_linear_pointwise"}
SPANS = {"folo: attention": "attention", "folo: kv write": "KV write"}
FORWARD = "folo: forward"
PYTHON = "Python between operators"
OTHER = "other model operators"
LINEAR_STAGES = ("qkv", "attention out", "gate-up", "down", "head")
"""Native stages that are products with weights."""
MODEL_ROWS = ("linears", "attention", "KV write", OTHER, PYTHON)
STAGE_TRACK, OPERATOR_TRACK = 3, 4


@attrs.define(slots=True)
class Phase:
    """What the steps of one kind came to."""

    steps: int = 0
    seconds: Counter[str] = attrs.field(factory=Counter)
    """By stage, then by row of the table."""
    work: Counter[str] = attrs.field(factory=Counter)
    """Tokens that ran, tokens attended over, and rows of logits."""


@attrs.frozen(slots=True)
class Machine:
    """What this machine does at best, measured in this run."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(cls) -> Machine:
        """Read 256 MiB, and multiply matrices of 1024 x 1024, each as fast as torch does it."""
        memory, square = torch.ones(1 << 26), torch.ones(1024, 1024)
        read = min(_timed(memory.sum) for _ in range(7))
        product = min(_timed(lambda: square @ square) for _ in range(7))
        return cls(4 * (1 << 26) / read, 2 * 1024**3 / product)

    def limit(self, num_bytes: float, flops: float = 0.0) -> float:
        """Return the least seconds that reading so much and computing so much takes."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def _timed(work: Any) -> float:  # noqa: ANN401 (any callable)
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Profile:
    """One engine's workload, run and taken apart."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.timeline = Timeline()
        length = args.prompt + args.tokens + 1
        room = 2 * args.batch * (length // 16 + 1) + 1  # all requests side by side
        options = {"max_num_seqs": args.batch, "max_model_len": length, "block_size": 16, "num_blocks": room}
        config = EngineConfig.from_options(model=args.model, **options)
        self.engine: Engine = LLM.from_config(config, load_registry(extra=[self.timeline])).engine
        self.model: Any = self.engine.executor.runner.model
        self.backend: Any = self.engine.executor.runner.backend
        self.counters = find_counters(self.model)
        self.phases = {"prompt": Phase(), "decode": Phase()}
        self.shares: dict[str, Counter[str]] = {}
        self.spans: list[tuple[str, float, float]] = []
        self.operators: list[tuple[str, float, float]] = []

    def ask(self, tokens: int) -> None:
        """Queue the requests."""
        generator = torch.Generator().manual_seed(0)
        high = self.model.info.vocab_size
        params = SamplingParams(
            temperature=self.args.temperature, max_tokens=tokens, ignore_eos=True, output_kind="FINAL_ONLY"
        )
        for row in range(self.args.batch):
            prompt = torch.randint(min(100, high // 2), high, (self.args.prompt,), generator=generator).tolist()
            self.engine.add_request(f"row-{row}", prompt, params)

    def run(self) -> None:
        """Run all requests to their end, by the clock."""
        stages = Stages(self.engine)
        stages.keep_spans = True
        self.ask(self.args.tokens)
        ended = time.perf_counter()
        while self.engine.has_unfinished_requests:
            before, waited = self._counted(), time.perf_counter() - ended
            self.engine.step()
            ended = time.perf_counter()
            phase = self._note(stages)
            phase.seconds["waiting between steps"] += waited
            for name, seconds in self._counted().items():
                phase.seconds[f"model: {name}"] += seconds - before.get(name, 0.0)
            self.spans += stages.spans
            stages.clear()
        stages.close()

    def _counted(self) -> dict[str, float]:
        return {} if self.counters is None else dict(self.counters.stage_seconds())

    def _note(self, stages: Stages) -> Phase:
        record = next(r for r in reversed(self.timeline.records) if hasattr(r, "num_tokens"))
        phase = self.phases["prompt" if record.num_tokens > record.num_seqs else "decode"]
        phase.steps += 1
        phase.seconds.update(stages.seconds)
        lengths = sum(r.live[0].num_computed_tokens for r in self.engine.requests.values() if r.live)
        phase.work.update(tokens=record.num_tokens, attended=lengths, rows=record.num_sampled)
        return phase

    def watch_operators(self) -> None:
        """Run the requests again, for a few tokens, and see which operators the forward is made of."""
        undo = [
            _name_spans(owner, method, name)
            for owner, method, name in (
                (self.model, "forward", FORWARD),
                (self.backend, "forward", "folo: attention"),
                (self.backend, "_write", "folo: kv write"),
            )
            if hasattr(owner, method)
        ]
        self.ask(self.args.profiled)
        while self.engine.has_unfinished_requests:
            begin = time.perf_counter()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                self.engine.step()
            record = next(r for r in reversed(self.timeline.records) if hasattr(r, "num_tokens"))
            phase = "prompt" if record.num_tokens > record.num_seqs else "decode"
            self._add_shares(self.shares.setdefault(phase, Counter()), profiler.events(), begin)
        for owner, method in undo:
            delattr(owner, method)

    def _add_shares(self, shares: Counter[str], events: Any, begin: float) -> None:  # noqa: ANN401 (torch's own list)
        first = min((event.time_range.start for event in events), default=0.0)
        for event in events:
            row = _row_of(event)
            if row is not None:
                shares[row] += event.self_cpu_time_total
                start = begin + (event.time_range.start - first) / 1e6
                self.operators.append((event.name, start, start + event.time_range.elapsed_us() / 1e6))

    def table(self, name: str, machine: Machine) -> list[tuple[str, float, float | None]]:
        """Return a phase's rows: name, seconds a step, and the least that the machine could take for it."""
        phase = self.phases[name]
        per_step = {row: seconds / phase.steps for row, seconds in phase.seconds.items()}
        limits = self._limits(phase, machine)
        counted = {row.removeprefix("model: "): s for row, s in per_step.items() if row.startswith("model: ")}
        forward = per_step.get("forward", 0.0)
        shares = self.shares.get(name, Counter())
        if counted:
            linears = sum(counted.get(stage, 0.0) for stage in LINEAR_STAGES)
            parts = {f"- {row}" if row in LINEAR_STAGES else row: seconds for row, seconds in counted.items()}
            model = {"linears": linears} | parts | {PYTHON: max(forward - sum(counted.values()), 0.0)}
        else:
            total = sum(shares.values()) or 1
            model = {row: forward * shares[row] / total for row in MODEL_ROWS}
        others = [stage for stage in (*STAGES, "waiting between steps") if stage != "forward"]
        rows = model | {stage: per_step.get(stage, 0.0) for stage in others}
        return [(row, seconds, limits.get(row)) for row, seconds in rows.items()]

    def _limits(self, phase: Phase, machine: Machine) -> dict[str, float]:
        """Return the least seconds a step of what is bound by memory or arithmetic."""
        info, work = self.model.info, {name: count / phase.steps for name, count in phase.work.items()}
        size = getattr(torch, info.dtype).itemsize
        head = _head_parameters(self.model)
        flops = 2.0 * ((info.num_parameters - head) * work["tokens"] + head * work["rows"])
        return {
            "linears": machine.limit(info.num_parameters * size, flops),
            "attention": machine.limit(info.kv_bytes_per_token * work["attended"]),
            "KV write": machine.limit(info.kv_bytes_per_token * work["tokens"]),
            "kv write": machine.limit(info.kv_bytes_per_token * work["tokens"]),
            "sampling": machine.limit(4.0 * info.vocab_size * work["rows"]),
        }

    def write_trace(self, path: Path) -> None:
        """Write the engine's steps and requests, its stages and the operators, on one clock."""
        trace = self.timeline.trace(model=self.args.model)
        origin = min(getattr(record, "started", getattr(record, "time", 0.0)) for record in self.timeline.records)
        for group, title, spans in (
            (STAGE_TRACK, "stages", self.spans),
            (OPERATOR_TRACK, "operators (a run under the profiler)", self.operators),
        ):
            trace["traceEvents"].append({"ph": "M", "pid": group, "name": "process_name", "args": {"name": title}})
            for name, begin, end in sorted(spans, key=lambda span: (span[1], -span[2])):
                times = {"ts": (begin - origin) * 1e6, "dur": (end - begin) * 1e6}
                trace["traceEvents"].append({"ph": "X", "pid": group, "tid": group, "name": name, **times})
        path.write_text(json.dumps(trace), encoding="utf-8")


def _head_parameters(model: Any) -> int:  # noqa: ANN401 (a loaded model of any kind)
    """Weights of the head, which runs on the sampled tokens alone; 0 where that is not known."""
    matrices = getattr(model, "matrices", None)
    return matrices[-1].outputs * matrices[-1].inputs if matrices else 0


def find_counters(model: Any) -> Any | None:  # noqa: ANN401 (a loaded model of any kind)
    """Return what counts the model's seconds by itself: the model, or one of its parts."""
    parts = [model, *vars(model).values()]
    return next((part for part in parts if callable(getattr(part, "stage_seconds", None))), None)


def _name_spans(owner: Any, method: str, name: str) -> tuple[Any, str]:  # noqa: ANN401 (any part of an engine)
    call = getattr(owner, method)

    def named(*args: object, **kwargs: object) -> object:
        with record_function(name):
            return call(*args, **kwargs)

    setattr(owner, method, named)
    return owner, method


def _row_of(event: Any) -> str | None:  # noqa: ANN401 (torch's own event)
    """Return the row of the table that an operator's own time belongs to; None outside the forward."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    if FORWARD not in names:
        return None
    if names[0] == FORWARD:
        return PYTHON
    span = next((SPANS[name] for name in names if name in SPANS), None)
    if span is not None:
        return span
    return "linears" if LINEARS.intersection(names) else OTHER


def show(name: str, phase: Phase, rows: list[tuple[str, float, float | None]]) -> None:
    """Print one phase's table, as Markdown."""
    total = sum(seconds for _, seconds, _ in rows)
    tokens = phase.work["tokens"] / phase.steps
    print(f"\n{name} steps: {phase.steps}, {tokens:.0f} tokens and {total * 1e3:.1f} ms each\n")
    print("| | ms a step | share | at best, ms | times that |\n|---|--:|--:|--:|--:|")
    for row, seconds, limit in rows:
        least = "" if limit is None else f"{limit * 1e3:.2f}"
        ratio = "" if not limit else f"{seconds / limit:.1f}"
        print(f"| {row} | {seconds * 1e3:.2f} | {seconds / total:.1%} | {least} | {ratio} |")


def main() -> None:
    """Print the tables, and write the trace if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a model as for LLM (default demo)")
    parser.add_argument("--batch", type=int, default=32, help="requests, all at once (default 32)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request (default 32)")
    parser.add_argument("--profiled", type=int, default=5, help="new tokens of the run under the profiler (default 5)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--trace", type=Path, help="file to write a trace to, for ui.perfetto.dev")
    args = parser.parse_args()
    machine = Machine.measure()
    print(
        f"{args.model}, {args.batch} requests of {args.prompt} + {args.tokens} tokens, "
        f"{torch.get_num_threads()} threads; memory is read at {machine.bytes_per_second / 1e9:.1f} GB/s, "
        f"matrices multiply at {machine.flops_per_second / 1e9:.0f} GFLOP/s"
    )
    found = Profile(args)
    found.run()
    if found.counters is None:
        found.watch_operators()
    for name, phase in found.phases.items():
        if phase.steps:
            show(name, phase, found.table(name, machine))
    if args.trace is not None:
        found.write_trace(args.trace)
        print(f"\nwrote {args.trace}: open it in ui.perfetto.dev")


if __name__ == "__main__":
    main()
