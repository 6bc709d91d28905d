"""Where each engine lives: an environment of its own with pinned versions, made when it is first needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".nox" / "peers"
STAMP = "installed.txt"


class SkippedError(Exception):
    """An engine takes no part; the text says why."""


@attrs.frozen
class Engine:
    """A contestant: a script in engines/ and the environment that it runs in."""

    name: str
    environment: str | None
    """Folder under .nox/peers and requirements file; None for the environment of the harness itself."""
    shown: str


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("folo", None, "Folo"),
        Engine("transformers", "transformers", "transformers generate"),
        Engine("transformers_cb", "transformers", "transformers continuous batching"),
        Engine("llamacpp", "llamacpp", "llama.cpp"),
        Engine("vllm", "vllm", "vLLM CPU"),
        Engine("ctranslate2", "ctranslate2", "CTranslate2"),
    )
}


def python_of(engine: Engine, say: Callable[[str], None]) -> str:
    """Return the interpreter that runs an engine; make its environment first if there is none.

    Raises:
        SkippedError: it cannot be installed here.
    """
    if engine.environment is None:
        return sys.executable
    folder = WORK / engine.environment
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = _fingerprint(engine.environment)
    stamp = folder / STAMP
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        say(f"installing {engine.shown} into {folder}, once; this takes minutes")
        _install(engine.environment, folder, python)
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _requirements(name: str) -> list[tuple[Path, list[str]]]:
    """Return the requirement files of an environment, each with pip's options for it."""
    folder = HERE / "requirements"
    # vLLM's own requirements name packages that it does better without, so it is installed without them.
    files = [(folder / f"{name}.txt", []), (folder / f"{name}.no-deps.txt", ["--no-deps"])]
    return [(path, options) for path, options in files if path.is_file()]


def _fingerprint(name: str) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path, _ in _requirements(name))).hexdigest()


def _install(name: str, folder: Path, python: Path) -> None:
    log = WORK / f"{name}.install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    commands = [[sys.executable, "-m", "venv", str(folder)]] if not python.exists() else []
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    commands += [[*pip, *options, "-r", str(path)] for path, options in _requirements(name)]
    with log.open("w", encoding="utf-8") as output:
        for command in commands:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
            if status:
                raise SkippedError(f"could not be installed: {reason_in(log)} (whole story: {log})")


def reason_in(log: Path) -> str:
    """Return the line of a log that most likely says what went wrong: the last one with an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]
