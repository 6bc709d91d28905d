"""Contestants as processes, and rounds in which they take turns."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import attrs

from machine import ENOUGH, FOREIGN, Gate, cpu_time
from peers import ENGINES, HERE, WORK, SkippedError, python_of, reason_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from settings import Candidate
    from workloads import Workload

START_LIMIT = 900.0
"""Seconds within which an engine must have loaded: the first time it may convert its model or compile."""

GRACE = 20.0
"""Seconds that an idle engine gets to end."""


class Worker:
    """A process with one engine in it, set as one candidate says. It sleeps unless it is told to do something."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], name: str) -> None:
        self._log = WORK / "logs" / f"{name}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command], env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._busy = True
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.describes: dict[str, Any] = self._answer(START_LIMIT)["ready"]
        except SkippedError:
            self.close()
            raise

    def warm(self, workload: Workload, limit: float) -> None:
        """Let the engine do what its first run of a workload needs."""
        self._ask("warm", workload, limit)

    def run(self, workload: Workload, limit: float) -> tuple[float, list[list[int]]]:
        """Return the seconds that a workload took, and the new ids of each answer.

        Raises:
            SkippedError: the engine cannot do it, failed, or took longer than the limit and was ended.
        """
        answer = self._ask("run", workload, limit)
        return answer["seconds"], answer["ids"]

    def close(self) -> None:
        """End the process: at its own pace if it waits for commands, at once if it is in the middle of something."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if self._busy else GRACE)
        self.kill()

    def kill(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):  # none of them is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _ask(self, command: str, workload: Workload, limit: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            raise SkippedError(f"its process has ended: {reason_in(self._log)}")
        self._busy = True
        print(json.dumps({"command": command, "workload": workload.message()}), file=self.process.stdin, flush=True)
        return self._answer(limit)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit)
            self._busy = False
        except queue.Empty:
            self.kill()
            raise SkippedError(f"not finished in {limit:.0f} s") from None
        if not line:
            raise SkippedError(f"its process ended: {reason_in(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "skipped" in answer or "error" in answer:
            raise SkippedError(answer.get("skipped") or answer["error"])
        return answer


@attrs.frozen(kw_only=True)
class Run:
    """One measured run of one engine."""

    workload: str
    engine: str
    candidate: str
    round: int
    seconds: float
    cores: float
    """What part of its full speed the slowest core had just before."""
    foreign: float | None
    """What part of all cores other processes took meanwhile."""

    @property
    def contended(self) -> bool:
        """Whether the machine was not this engine's alone."""
        return self.cores < ENOUGH or (self.foreign or 0.0) > FOREIGN


@attrs.define
class Contest:
    """Starts engines as they are needed, and measures them."""

    model: dict[str, Any]
    """Files and sizes that every engine is told."""
    say: Callable[[str], None]
    gate: Gate = attrs.field(factory=Gate)
    limit: float = 300.0
    pythons: dict[str, str | SkippedError] = attrs.field(factory=dict)
    """Each engine's interpreter, or why there is none."""
    running: dict[tuple[str, str], Worker] = attrs.field(factory=dict)
    versions: dict[str, dict[str, str]] = attrs.field(factory=dict)

    def prepare(self, engine: str) -> None:
        """Make an engine's environment if there is none; if that fails, remember why for whoever wants to start it."""
        try:
            self.pythons[engine] = python_of(ENGINES[engine], self.say)
        except SkippedError as reason:
            self.pythons[engine] = reason

    def worker(self, candidate: Candidate, workload: Workload) -> Worker:
        """Return a candidate's process, started and warm for a workload.

        Raises:
            SkippedError: it cannot be.
        """
        key = candidate.engine, candidate.name
        if key not in self.running:
            python = self.pythons[candidate.engine]
            if isinstance(python, SkippedError):
                raise python
            self.say(f"starting {ENGINES[candidate.engine].shown} ({candidate.name})")
            options = json.dumps(self.model | candidate.options)
            command = [python, "-P", str(HERE / "worker.py"), candidate.engine, options]
            self.running[key] = Worker(command, candidate.environment(python), f"{candidate.engine}-{candidate.name}")
            self.versions[candidate.engine] = self.running[key].describes
        self.running[key].warm(workload, self.limit)
        return self.running[key]

    def measure(self, worker: Worker, candidate: Candidate, workload: Workload, number: int) -> tuple[Run, Any]:
        """Wait for the cores, run a workload once, and say how it went; also return the ids."""
        cores = self.gate.wait()
        before = cpu_time(worker.process.pid)
        seconds, ids = worker.run(workload, self.limit)
        after = cpu_time(worker.process.pid)
        check(workload, ids)
        foreign = before.foreign_until(after) if before and after else None
        run = Run(
            workload=workload.name, engine=candidate.engine, candidate=candidate.name, round=number, seconds=seconds,
            cores=cores, foreign=foreign,
        )  # fmt: skip
        mark = "  contended" if run.contended else ""
        shown = f"{workload.result(seconds):.1f} {workload.unit} ({seconds:.2f} s)"
        self.say(f"{workload.name} round {number}: {ENGINES[candidate.engine].shown}: {shown}{mark}")
        return run, ids

    def close(self) -> None:
        """End all processes."""
        for worker in self.running.values():
            worker.close()
        self.running.clear()


def check(workload: Workload, ids: list[list[int]]) -> None:
    """Refuse a run whose answers are not as many and as long as was asked for.

    Raises:
        SkippedError: they are not.
    """
    each = workload.width if workload.kind == "sample" else 1
    wanted = [new for new in workload.new for _ in range(each)]
    lengths = [len(answer) for answer in ids]
    if lengths != wanted:
        raise SkippedError(f"gave answers of {lengths} tokens where {wanted} were asked for")
