"""Run every benchmark of this folder, or those named, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NO_BENCHMARKS = {"mutants", "run_all", "stages", "timing"}


def main(names: list[str]) -> int:
    """Run ``names``, or all; return the first exit status that is not zero."""
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_BENCHMARKS)
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    status = 0
    for name in names or known:
        print(f"\n== {name}", flush=True)
        finished = subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], check=False)
        status = status or finished.returncode
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
