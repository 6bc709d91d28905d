"""Measures Folo on one GPU: speed on six workloads, what the device could do, and whether the tokens are right.

``python bench/gpu/run.py --json result.json`` measures everything; docs/how-to/measure-on-a-gpu.md says what the
figures mean. Progress goes to stderr, the tables to stdout. ``--tiny`` tries the script itself on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

import anchors
import attention_check
import ceilings
import gpu_workloads
import greedy_check
import measure
import shapes
import startup
import traces

if TYPE_CHECKING:
    from folo_core import LLM
    from gpu_workloads import Workload
    from shapes import Shape

Answers = tuple[list[list[int]], list[list[int]]]
"""Prompts, and the answers to them."""
BEGIN = time.monotonic()
NAMES = ("W1", "W2", "W3", "W4", "W5", "W6")
PROFILED = 24
"""Most tokens of each answer in a profiled run: enough steps to see, few enough to open."""
CHECKED = ((7, 33, 128, 300), 32)
"""Lengths of the prompts whose greedy answers are compared with transformers', and how many tokens they get."""


class OutOfTimeError(BaseException):
    """``--time-limit`` has passed. No ``Exception``: the engine would take it for a fault of the part that runs."""


def say(text: str) -> None:
    """Print progress with the seconds since the script began."""
    print(f"[{time.monotonic() - BEGIN:6.1f} s] {text}", file=sys.stderr, flush=True)


def option(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as JSON where it is some.

    Raises:
        ArgumentTypeError: there is no name or no equals sign.
    """
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=VALUE, such as attention=sdpa")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def names(known: tuple[str, ...]) -> Any:  # noqa: ANN401 (a type for argparse)
    """Return a function that reads a list of these names."""

    def read(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if wrong := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(known)}")
        return found

    return read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", type=names(NAMES), default=list(NAMES), metavar="W1,W3", help="which of W1 to W6 (default all)")
    add("--models", type=names(("A", "B")), default=["A", "B"], metavar="A,B", help="which models (default both)")
    add("--rounds", type=int, default=3, help="measured rounds of each workload, after one that warms up (default 3)")
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help="an engine option; repeatable")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checks", action=argparse.BooleanOptionalAction, default=True, help="compare with transformers (default)")
    add("--startup", type=names(("A", "B")), default=["A"], metavar="A", help="models to time a start of; '' for none")
    add("--json", type=Path, metavar="FILE", help="write all samples, checks and options")
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="write a trace (.json or .json.gz) of the first workload, cut short",
    )
    add("--time-limit", type=float, metavar="SECONDS", help="stop after this long, and show what there is")
    add("--tiny", action="store_true", help="tiny models and few requests, to try the script itself")
    return parser.parse_args(arguments)


@attrs.define
class Report:
    """What has been found so far."""

    rates: ceilings.Ceilings | None = None
    lines: list[anchors.Line] = attrs.field(factory=list)
    samples: list[measure.Sample] = attrs.field(factory=list)
    agreements: dict[str, greedy_check.Agreement] = attrs.field(factory=dict)
    attention: list[attention_check.AttentionCheck] = attrs.field(factory=list)
    starts: dict[str, dict[str, startup.Start]] = attrs.field(factory=dict)
    profiled: str | None = None
    """Which workload's profile was taken."""
    profile: traces.Idleness | None = None
    unfinished: str | None = None
    """What stopped the run, if anything did."""

    def show(self) -> None:
        """Print the tables."""
        if self.rates is not None:
            print(f"copy {self.rates.copy / 1e12:.2f} TB/s   matmul {self.rates.matmul / 1e12:.0f} TFLOP/s")
        if self.lines:
            print(anchors.table(self.lines))
        for model, found in self.agreements.items():
            print(
                f"greedy, model {model}: {found.same} of {found.tokens} tokens are the likeliest, {found.ties} tie "
                f"(the widest by {found.widest:.1f} roundings; transformers' own ways to attend differ by "
                f"{found.noise:.1f}), {found.equal_answers} of {found.answers} answers are those of generate: "
                f"{'holds' if found.holds else 'DOES NOT HOLD'}"
            )
        for checked in self.attention:
            window = "" if checked.window is None else f", a window of {checked.window}"
            verdict = "holds" if checked.holds else "DOES NOT HOLD"
            print(
                f"attention {checked.backend!r}, heads of model {checked.model}{window}: off from float32 by "
                f"{checked.error:.2g}: {verdict}"
            )
        for model, times in self.starts.items():
            shown = ", ".join(
                f"{w} {t.ready:.1f} s to ready, {t.first_token:.1f} s to a token" for w, t in times.items()
            )
            print(f"start-up, model {model}: {shown}")
        if self.profiled is not None:
            print(f"{self.profiled}: {traces.show(self.profile)}")
        if self.unfinished is not None:
            print(f"unfinished: {self.unfinished}")

    def write(self, file: Path, args: argparse.Namespace) -> None:
        """Write everything for programs."""
        found = attrs.asdict(self)
        found["machine"] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        found["options"] = dict(args.option)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")


@attrs.frozen
class Session:
    """One run of the script."""

    args: argparse.Namespace
    report: Report
    folder: Path

    @property
    def sizes(self) -> gpu_workloads.Sizes:
        """How large the workloads are."""
        return gpu_workloads.TINY if self.args.tiny else gpu_workloads.FULL

    def run(self) -> None:
        """Measure all that was asked for."""
        args, report = self.args, self.report
        say(f"ceilings of {args.device}")
        report.rates = ceilings.measure(args.device, tiny=args.tiny)
        release()
        wanted = [w for w in gpu_workloads.workloads(self.sizes) if w.name in args.workloads and w.model in args.models]
        for name, shape in shapes.shapes(tiny=args.tiny).items():
            self.measure_model(shape, [workload for workload in wanted if workload.model == name])
        for name in args.startup:
            self.time_start(shapes.shapes(tiny=args.tiny)[name])

    def measure_model(self, shape: Shape, wanted: list[Workload]) -> None:
        """Run a model's workloads, those with the same engine options in one engine, and check its tokens."""
        if not wanted:
            return
        if self.args.checks:
            say(f"model {shape.name}: attention against float32")
            options, tiny = dict(self.args.option), self.args.tiny
            self.report.attention += attention_check.check(shape, self.args.device, options, tiny=tiny)
            release()
        folder = shapes.write_empty_folder(shape, self.folder / shape.name)
        groups: dict[str, list[Workload]] = {}
        for workload in wanted:
            groups.setdefault(json.dumps(workload.options), []).append(workload)
        answers = None
        for group in groups.values():
            found = self.measure_group(shape, folder, group, check=self.args.checks and answers is None)
            answers = answers or found
            release()
        if answers is not None:
            say(f"model {shape.name}: compare with transformers")
            self.report.agreements[shape.name] = greedy_check.judge(folder, self.args.device, *answers)
            release()

    def measure_group(self, shape: Shape, folder: Path, group: list[Workload], *, check: bool) -> Answers | None:
        """Run workloads in one engine, which nothing holds afterwards; return its greedy answers if they are wanted."""
        start = time.monotonic()
        llm = measure.open_engine(shape, folder, self.args.device, group[0].options | dict(self.args.option))
        seconds = time.monotonic() - start
        say(f"model {shape.name} ({shape.like}) is ready after {seconds:.1f} s {group[0].options or ''}")
        answers = self.greedy(llm) if check else None
        for workload in group:
            self.measure(llm, shape, workload)
        return answers

    def greedy(self, llm: LLM) -> Answers:
        """Return the prompts whose answers are checked, and the engine's answers."""
        lengths, new = ((3, 5, 9), 8) if self.args.tiny else CHECKED
        prompts = [gpu_workloads.draw(1, length, self.sizes.top_id, seed=length)[0] for length in lengths]
        asked = gpu_workloads.Workload(
            name="check",
            model="",
            kind="plain",
            prompts=prompts,
            new=[new] * len(prompts),
            sampling={"temperature": 0.0},
        )
        together = llm.generate(prompts, measure.params_of(asked), use_tqdm=False)
        measure.check_lengths(asked, together)
        # A row that is alone takes other kernels.
        alone = [
            llm.generate([prompt], [params], use_tqdm=False)[0]
            for prompt, params in zip(prompts, measure.params_of(asked), strict=True)
        ]
        return prompts * 2, [output.outputs[0].token_ids for output in (*together, *alone)]

    def measure(self, llm: LLM, shape: Shape, workload: Workload) -> None:
        """Warm up, then run all rounds; every line is kept as soon as its rounds are done."""
        say(f"{workload.key}: {len(workload.prompts)} requests, {workload.tokens} tokens; warm-up")
        measure.run(llm, workload)
        rounds = []
        try:
            for number in range(self.args.rounds):
                rounds.append(measure.run(llm, workload))
                shown = ", ".join(f"{sample.key} {sample.seconds:.3f} s" for sample in rounds[-1])
                say(f"{shown} (round {number + 1} of {self.args.rounds})")
        finally:
            assert self.report.rates is not None
            for samples in zip(*rounds, strict=True):
                self.report.samples += samples
                self.report.lines.append(anchors.line(workload, shape, samples, self.report.rates, tiny=self.args.tiny))
            if self.args.json is not None:
                self.report.write(self.args.json, self.args)
        if self.args.profile is not None and self.report.profiled is None:
            self.profile(llm, workload)

    def profile(self, llm: LLM, workload: Workload) -> None:
        """Profile the workload with shorter answers."""
        short = attrs.evolve(workload, new=[min(new, PROFILED) for new in workload.new])
        measure.run(llm, short)
        say(f"{workload.key}: profile of {PROFILED} tokens of each request, into {self.args.profile}")
        self.report.profiled = workload.key
        self.report.profile = traces.record(lambda: measure.run(llm, short), self.args.profile)

    def time_start(self, shape: Shape) -> None:
        """Time a cold and a warm start from weights on the disk."""
        say(f"start-up of model {shape.name}: write its weights")
        empty = shapes.write_empty_folder(shape, self.folder / shape.name)
        real = startup.write_folder(empty, self.folder / f"{shape.name}-written", self.args.device)
        release()
        say(f"start-up of model {shape.name}: cold, then warm")
        options = {"max_model_len": shape.max_model_len} | dict(self.args.option)
        self.report.starts[shape.name] = startup.measure(real, self.args.device, options, limit=self.remaining())

    def remaining(self) -> float:
        """Seconds until ``--time-limit``."""
        limit = self.args.time_limit
        return 3600.0 if limit is None else max(1.0, limit - (time.monotonic() - BEGIN))


def release() -> None:
    """Give back the device's memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stop(*_signal: object) -> None:
    raise OutOfTimeError


def main(arguments: list[str] | None = None) -> int:
    """Measure, and show what there is when it is done, interrupted or out of time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args = parse(arguments)
    report = Report()
    if args.time_limit is not None:
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, args.time_limit - (time.monotonic() - BEGIN)))
    try:
        with tempfile.TemporaryDirectory(prefix="folo-gpu-") as folder:
            Session(args, report, Path(folder)).run()
    except (OutOfTimeError, subprocess.TimeoutExpired):
        report.unfinished = f"--time-limit {args.time_limit:.0f} s"
    except KeyboardInterrupt:
        report.unfinished = "interrupted"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.show()
        if args.json is not None:
            report.write(args.json, args)
    verdicts = [found.holds for found in report.agreements.values()] + [each.holds for each in report.attention]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
