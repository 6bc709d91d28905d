"""Folo beside other engines on this processor: the same weights, token ids and threads, in turns.

Each engine has a process and, but for Folo, an environment of its own, which is made on first use. Workloads are run
one after the other; in each round every engine runs once, in an order that alternates. Medians over the rounds are
shown, and ratios within them: what a slow minute does to one engine it does to its neighbour, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import models
import settings
import verdict
from contest import Contest, Run
from peers import ENGINES, SkippedError
from workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contest import Worker
    from settings import Candidate, Settings
    from workloads import Workload

USUAL = ("C1", "C2", "C3", "C4", "C2q")
NOISE = 1.05
STARTED = time.monotonic()


def say(text: str) -> None:
    """Show progress on standard error."""
    print(f"[{time.monotonic() - STARTED:6.0f} s] {text}", file=sys.stderr, flush=True)


def names(known: dict[str, Any]) -> Any:  # noqa: ANN401 (argparse's idea of a type)
    """Return what reads ``A,B`` into a list of known names."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
        return found

    return read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", type=names(WORKLOADS), default=list(USUAL), help=f"some of {','.join(WORKLOADS)}")
    add("--engines", type=names(ENGINES), default=list(ENGINES), help=f"some of {','.join(ENGINES)}")
    add("--model", choices=models.MODELS, default="demo", help="the demo model (default) or Gemma 3 270M")
    add("--rounds", type=int, default=3, help="measured rounds of each workload (default 3)")
    add("--tune", action="store_true", help="try each engine's candidates, store the fastest, and measure nothing else")
    some = "take these candidates where they suit; with --tune: try only those"
    add("--candidates", type=lambda text: text.split(","), default=[], metavar="A,B", help=some)
    add("--limit", type=float, default=300.0, help="seconds that one run may take (default 300)")
    add("--json", type=Path, metavar="FILE", help="write all runs and the summary")
    add("--resume", type=Path, metavar="FILE", help="add rounds to such a file; it is written after every run")
    add("--plot", type=Path, metavar="FILE", help="draw a picture (needs the dependency group bench)")
    add("--lock", type=Path, metavar="FILE", help="hold this file's lock (flock) while engines compute, and only then")
    args = parser.parse_args(arguments)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; `nox -s peers` installs it, or: pip install matplotlib")
    return args


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Hold a file's lock, so that others who honour it do not compute meanwhile."""
    if lock is None:
        yield
        return
    import fcntl

    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Tune, or measure and show what came out."""
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the engines end, too
    sizes = {"longest": max(w.longest for w in WORKLOADS.values()), "width": 32}
    contest = Contest(models.files(args.model) | sizes, say, limit=args.limit)
    results = read(args.resume) if args.resume and args.resume.exists() else verdict.Results()
    session = Session(args, contest, settings.load(), results)
    try:
        for engine in args.engines:
            contest.prepare(engine)
        for workload in (WORKLOADS[name] for name in args.workloads):
            (session.tune if args.tune else session.measure)(workload)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        contest.close()
    if not args.tune:
        show(results, args.plot)
    return 0


@attrs.frozen
class Session:
    """What the command line asked for, the engines, and what they have done so far."""

    args: argparse.Namespace
    contest: Contest
    table: Settings
    results: verdict.Results

    def measure(self, workload: Workload) -> None:
        """Run all rounds of one workload."""
        with held(self.args.lock):
            ready = self.enter(workload)
        first = self.results.next_round(workload.name)
        for number in range(first, first + self.args.rounds):
            with held(self.args.lock):
                # The order alternates, so that no engine always follows the same one.
                for engine in list(ready) if number % 2 else list(ready)[::-1]:
                    if not self.turn(*ready[engine], workload, number):
                        del ready[engine]
                    self.keep()

    def enter(self, workload: Workload) -> dict[str, tuple[Candidate, Worker]]:
        """Start and warm up the engines that can do a workload; note why the others cannot."""
        ready = {}
        skipped = self.results.skipped.setdefault(workload.name, {})
        for engine in self.args.engines:
            skipped.pop(engine, None)
            try:
                candidate = self.table.chosen(engine, workload.name, self.args.candidates)
                ready[engine] = candidate, self.contest.worker(candidate, workload)
            except SkippedError as reason:
                skipped[engine] = str(reason)
                say(f"{workload.name}: {ENGINES[engine].shown} is skipped: {reason}")
        return ready

    def turn(self, candidate: Candidate, worker: Worker, workload: Workload, number: int) -> bool:
        """Let one engine run once; return whether it stays in this workload."""
        engine = candidate.engine
        try:
            run, ids = self.contest.measure(worker, candidate, workload, number)
        except SkippedError as reason:
            self.results.skipped[workload.name][engine] = str(reason)
            say(f"{workload.name}: {ENGINES[engine].shown} drops out: {reason}")
            return False
        self.results.runs.append(run)
        if workload.kind == "greedy":
            self.results.answers.setdefault(workload.name, {})[engine] = ids
        return True

    def keep(self) -> None:
        """Write what is known so far, so that an interruption loses one run at most."""
        for path in filter(None, (self.args.json, self.args.resume)):
            write(self.results, self.contest, self.args, path)

    def tune(self, workload: Workload) -> None:
        """Try every candidate ``--rounds`` times, keep the one with the fastest run, and store it."""
        for engine in self.args.engines:
            fastest: dict[str, float] = {}
            suited = self.table.suited(engine, workload.name)
            for candidate in [c for c in suited if c.name in (self.args.candidates or [c.name])]:
                with held(self.args.lock), contextlib.suppress(SkippedError):
                    fastest[candidate.name] = self.attempt(candidate, workload)
            if fastest:
                # Less than this is noise, and then the file's order decides.
                near = NOISE * min(fastest.values())
                best = next(name for name, seconds in fastest.items() if seconds <= near)
                self.table.best.setdefault(engine, {})[workload.name] = best
                tried = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in fastest.items())
                say(f"{workload.name}: {ENGINES[engine].shown}: {best} (of {tried})")
                settings.store(self.table.best)

    def attempt(self, candidate: Candidate, workload: Workload) -> float:
        """Return the seconds of a candidate's fastest run; its process ends afterwards."""
        try:
            worker = self.contest.worker(candidate, workload)
            rounds = range(1, self.args.rounds + 1)
            runs = [self.contest.measure(worker, candidate, workload, number)[0] for number in rounds]
        except SkippedError as reason:
            say(f"{workload.name}: {ENGINES[candidate.engine].shown} ({candidate.name}) is skipped: {reason}")
            raise
        finally:
            self.contest.close()
        return min(run.seconds for run in runs)


def write(results: verdict.Results, contest: Contest, args: argparse.Namespace, path: Path) -> None:
    """Write everything that is known, for people, programs and ``--resume``."""
    content = {
        "model": args.model,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": contest.versions,
        "summary": verdict.summary(results),
        "runs": [attrs.asdict(run) for run in results.runs],
        "skipped": results.skipped,
        "answers": results.answers,
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> verdict.Results:
    """Read what an earlier run wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return verdict.Results([Run(**run) for run in content["runs"]], content["answers"], content["skipped"])


def show(results: verdict.Results, picture: Path | None) -> None:
    """Print the tables, for a terminal or for a file, and draw the picture if one is wanted."""
    if sys.stdout.isatty():
        verdict.pretty(results)
    else:
        print(verdict.plain(results))
    if picture is not None:
        import plot

        plot.draw(results, picture)
        say(f"drew {picture}")


if __name__ == "__main__":
    raise SystemExit(main())
