"""One engine in a process of its own: loads once, then does what it is told, a line of JSON at a time.

``python -P worker.py ENGINE OPTIONS`` runs ``engines/ENGINE.py``, which needs this file's Python (standard library
only) and the engine, and nothing else. Its ``load(options)`` returns an object with ``run(workload)``, which returns
the new token ids of each answer, and optionally ``warm(workload)``.

In comes ``{"command": "run" or "warm", "workload": {...}}``; out goes ``{"seconds": 1.2, "ids": [[...]]}``, or
``{"skipped": why}``, or ``{"error": what}``. While it waits it sleeps in a read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

WARM_TOKENS = 4


def main() -> None:
    """Load the engine named on the command line and serve it until the input ends."""
    # Libraries print to standard output; answers go where only they go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, options = sys.argv[1], json.loads(sys.argv[2])

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    engine = guarded(lambda: load(name, options), say)
    if engine is None:
        return
    say({"ready": getattr(engine, "describes", {})})
    for line in sys.stdin:
        message = json.loads(line)
        command = warm if message["command"] == "warm" else run
        answer = guarded(lambda command=command, message=message: command(engine, message["workload"]), say)
        if answer is not None:
            say(answer)


def load(name: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 (each engine has a class of its own)
    """Return the engine that ``engines/NAME.py`` makes."""
    path = Path(__file__).with_name("engines") / f"{name}.py"
    # By its path: `engines` must not be importable, or engines/vllm.py would stand for vLLM itself.
    spec = importlib.util.spec_from_file_location(f"engine_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.load(options)


def run(engine: Any, workload: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 (see above)
    """Do the whole workload and say how long it took."""
    start = time.perf_counter()
    ids = engine.run(workload)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "ids": [list(map(int, answer)) for answer in ids]}


def warm(engine: Any, workload: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 (see above)
    """Do what a first run needs once: the engine knows, or the workload with few new tokens stands for it."""
    if hasattr(engine, "warm"):
        engine.warm(workload)
    else:
        engine.run(workload | {"new": [min(new, WARM_TOKENS) for new in workload["new"]]})
    return {"warm": True}


def guarded(work: Any, say: Any) -> Any:  # noqa: ANN401 (a callable and whatever it returns)
    """Return what ``work`` returns; if it fails, report that instead and return None."""
    try:
        return work()
    except NotImplementedError as reason:
        say({"skipped": str(reason)})
    except Exception as error:  # noqa: BLE001 (whatever keeps an engine from running is reported)
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
    return None


if __name__ == "__main__":
    main()
