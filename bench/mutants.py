"""Mutation testing of the block pool and the schedulers: changes one thing at a time, and asks whether a test fails.

mutmut makes the mutants and runs the tests (``[tool.mutmut]`` in pyproject.toml says of what and with which); this
script picks a sample, judges the result against ``equivalent_mutants.toml`` and shows every survivor. Not mutated are
docstrings, annotations, texts of errors, names in ``__slots__``, and what mutmut leaves alone because it is decorated:
properties, class methods and the defaults of attrs fields.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".nox" / "mutants"
FOLDER = WORK / "mutants"
PARTS = {
    "src/folo_core": "src/folo_core",
    "plugins/folo-schedulers/src/folo_schedulers": "src/folo_schedulers",
    "plugins/folo-schedulers/tests": "plugins/folo-schedulers/tests",
    "tests": "tests",
    "conftest.py": "conftest.py",
    "pyproject.toml": "pyproject.toml",
}
"""What is copied where: mutmut wants all packages in one ``src``."""
KILLED = {"killed", "timeout", "segfault"}
ENVIRONMENT = {"FOLO_SOAK": "3000", "HYPOTHESIS_PROFILE": "mutants"}
GENERATE = "*.x_blocks_for__mutmut_1"
"""mutmut makes all mutants before it runs any; one is the least that it can be asked to run."""


@attrs.frozen
class Mutant:
    """A change of one line or statement, and what became of it."""

    name: str
    path: str
    line: int
    before: str
    after: str
    status: str
    why: str | None = None
    """Why no test can tell it from the original, if that is so."""

    @property
    def verdict(self) -> str:
        """``killed``, ``survived`` or ``equivalent``; one that was killed is not equivalent, whatever the list says."""
        if self.status in KILLED:
            return "killed"
        return "survived" if self.why is None else "equivalent"


@attrs.frozen
class Equivalents:
    """Changes that change no behaviour, known by their text, so that they survive when lines move."""

    changes: dict[tuple[str, str], str]
    rules: list[tuple[re.Pattern[str], str]]

    @classmethod
    def load(cls, path: Path) -> Equivalents:
        """Read the list."""
        data = tomllib.loads(path.read_text())
        changes = {
            (change["before"], after): change["why"] for change in data["change"] for after in _as_list(change["after"])
        }
        return cls(changes, [(re.compile(rule["ignoring"]), rule["why"]) for rule in data["rule"]])

    def why(self, before: str, after: str) -> str | None:
        """Return why this change is none, or None."""
        by_rule = (why for pattern, why in self.rules if pattern.sub("", before) == pattern.sub("", after))
        return self.changes.get((before, after)) or next(by_rule, None)


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def lay_out() -> None:
    """Copy what is mutated and what tests it, afresh."""
    shutil.rmtree(WORK, ignore_errors=True)
    for source, target in PARTS.items():
        (WORK / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, WORK / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, WORK / target)


def mutmut(jobs: int, *names: str) -> None:
    """Make the mutants if there are none, and run those of these names, or all.

    Raises:
        SystemExit: mutmut could not run; its last lines say why.
    """
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs), *names]
    log, environment = WORK / "log.txt", os.environ | ENVIRONMENT
    with log.open("w") as file:
        finished = subprocess.run(
            command, cwd=WORK, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if finished.returncode:
        raise SystemExit("\n".join(re.split(r"[\r\n]+", log.read_text())[-40:]))


def statuses() -> dict[str, dict[str, str]]:
    """Return each mutated file's mutants and what became of them."""
    from mutmut.stats import status_by_exit_code

    found = {}
    for meta in sorted(FOLDER.rglob("*.py.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        if codes:
            found[str(meta.relative_to(FOLDER))[: -len(".meta")]] = {
                name: status_by_exit_code[code] for name, code in codes.items()
            }
    return found


def judged(path: str, name: str, status: str, equivalents: Equivalents) -> Mutant:
    """Return a mutant with its change."""
    from mutmut.mutation.data import MutantLineSpans

    spans = MutantLineSpans.load(path)
    assert spans is not None
    lines = (FOLDER / path).read_text().splitlines()
    key = name.rpartition(".")[2]
    original = spans.span_by_function_name[re.sub(r"__mutmut_\d+$", "__mutmut_orig", key)]
    mutated = spans.span_by_function_name[key]
    texts = [lines[span.start - 1 : span.end] for span in (original, mutated)]
    # Without the line that names the function, which differs in any case.
    texts = [text[1 + next(n for n, line in enumerate(text) if line.lstrip().startswith("def ")) :] for text in texts]
    changed = [line for line in difflib.ndiff(*texts) if line[:2] in {"- ", "+ "}]
    before, after = (" ".join(line[2:].strip() for line in changed if line[0] == sign) for sign in "-+")
    place = next(source + path[len(target) :] for source, target in PARTS.items() if path.startswith(target))
    return Mutant(name, place, _line_of(path, *texts), before, after, status, equivalents.why(before, after))


def _line_of(path: str, original: list[str], mutated: list[str]) -> int:
    """Return the line of the source where two functions begin to differ: mutated files hold them elsewhere."""
    source = (WORK / path).read_text().splitlines()
    start = next((n for n in range(len(source)) if source[n : n + len(original)] == original), 0)
    pairs = enumerate(zip(original, mutated, strict=False))
    return 1 + start + next((n for n, (one, other) in pairs if one != other), 0)


def report(mutants: list[Mutant], threshold: float) -> bool:
    """Print what survived and the figure; return whether it is good enough."""
    verdicts = Counter(mutant.verdict for mutant in mutants)
    for mutant in sorted(mutants, key=lambda m: (m.path, m.line)):
        if mutant.verdict == "survived":
            print(f"\n{mutant.path}:{mutant.line}  {mutant.status}  {mutant.name.rpartition('.')[2]}")
            print(f"  - {mutant.before}\n  + {mutant.after}")
    print("\nequivalent, and why:")
    reasons = Counter(mutant.why for mutant in mutants if mutant.verdict == "equivalent")
    for why, count in reasons.most_common():
        print(f"  {count:3}  {why}")
    print("\nby file (killed / survived / equivalent):")
    for path in sorted({mutant.path for mutant in mutants}):
        here = Counter(mutant.verdict for mutant in mutants if mutant.path == path)
        print(f"  {here['killed']:4} {here['survived']:4} {here['equivalent']:4}  {path}")
    killed, total = verdicts["killed"], len(mutants)
    share, counted = killed / total, killed / max(1, total - verdicts["equivalent"])
    print(f"\n{killed} of {total} mutants killed: {share:.1%}; of those that are not equivalent {counted:.1%}")
    return share >= threshold


def main(arguments: list[str]) -> int:
    """Run all mutants or a sample; 1 if too few were killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="how many, drawn at random; 0 for all")
    parser.add_argument("--all", action="store_const", const=0, dest="sample", help="run every one (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="*", help="pattern of mutants' names, such as '*planner*'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threshold", type=float, default=0.9, help="least share of all mutants to be killed")
    parser.add_argument("--json", type=Path, help="write every mutant and its verdict here")
    parser.add_argument("--keep", action="store_true", help="judge what ran before, and run nothing")
    options = parser.parse_args(arguments)
    if not options.keep:
        lay_out()
        run(options)
    os.chdir(WORK)  # where mutmut's own functions look for what it made
    equivalents = Equivalents.load(Path(__file__).with_name("equivalent_mutants.toml"))
    ran = [
        judged(path, name, status, equivalents)
        for path, mutants in statuses().items()
        for name, status in mutants.items()
        if status != "not checked"
    ]
    if options.json:
        entries: list[dict[str, Any]] = [attrs.asdict(mutant) | {"verdict": mutant.verdict} for mutant in ran]
        options.json.write_text(json.dumps(entries, indent=1))
    return 0 if report(ran, options.threshold) else 1


def run(options: argparse.Namespace) -> None:
    """Make the mutants and run those that were asked for."""
    if not options.sample:
        mutmut(options.jobs, *([] if options.only == "*" else [options.only]))
        return
    mutmut(options.jobs, GENERATE)
    from fnmatch import fnmatch

    names = sorted(n for mutants in statuses().values() for n in mutants if fnmatch(n, options.only))
    chosen = random.Random(options.seed).sample(names, min(options.sample, len(names)))  # noqa: S311 (a sample)
    mutmut(options.jobs, *chosen)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
