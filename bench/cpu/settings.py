"""Candidates: the ways in which each engine is tried, and which of them was the fastest for a workload."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from peers import SkippedError

if TYPE_CHECKING:
    from collections.abc import Collection

FILE = Path(__file__).with_name("settings.toml")
MARK = "# Chosen by --tune; everything below this line is written by it.\n"
THREADS = 2


@attrs.frozen(kw_only=True)
class Candidate:
    """One way of running an engine."""

    engine: str
    name: str
    workloads: list[str]
    threads: int = THREADS
    bind: bool = True
    env: dict[str, str] = attrs.field(factory=dict)
    more: dict[str, Any] = attrs.field(factory=dict)
    """What only this engine's script knows."""

    @property
    def options(self) -> dict[str, Any]:
        """What the engine's script is told."""
        return {"threads": self.threads, **self.more}

    def environment(self, python: str) -> dict[str, str]:
        """Return the environment variables of its process: threads bound to cores, or left to the system."""
        folder = str(Path(python).parents[1])
        binding = "true" if self.bind else "false"
        affinity = "granularity=fine,compact" if self.bind else "disabled"
        threads = str(self.threads)
        # PyTorch's and llama.cpp's OpenMP is GNU's; CTranslate2 and vLLM bring Intel's, which has a name of its own.
        common = {"OMP_NUM_THREADS": threads, "OMP_PROC_BIND": binding, "KMP_AFFINITY": affinity}
        return (
            common
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            | {name: value.replace("{environment}", folder) for name, value in self.env.items()}
        )


@attrs.define
class Settings:
    """All candidates, and the best ones by engine and workload."""

    candidates: list[Candidate]
    best: dict[str, dict[str, str]]
    reasons: dict[str, dict[str, str]] = attrs.field(factory=dict)
    """Why an engine has no candidate, by engine and workload."""

    def suited(self, engine: str, workload: str) -> list[Candidate]:
        """Return an engine's candidates for a workload, in the file's order."""
        return [found for found in self.candidates if found.engine == engine and workload in found.workloads]

    def chosen(self, engine: str, workload: str, wanted: Collection[str] = ()) -> Candidate:
        """Return the first candidate whose name is ``wanted``; without one the best that is known, else the first.

        Raises:
            SkippedError: there is none.
        """
        suited = self.suited(engine, workload)
        if not suited:
            raise SkippedError(self.reasons.get(engine, {}).get(workload, "it has no such mode"))
        best = self.best.get(engine, {}).get(workload)
        named = [found for found in suited if found.name in wanted]
        return next(iter([*named, *(found for found in suited if found.name == best), *suited]))


def load(path: Path = FILE) -> Settings:
    """Read the settings file."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    own = {field.name for field in attrs.fields(Candidate)}
    candidates = [
        Candidate(
            engine=engine,
            name=name,
            more={key: value for key, value in table.items() if key not in own},
            **{key: value for key, value in table.items() if key in own},
        )
        for engine, tables in data["candidates"].items()
        for name, table in tables.items()
    ]
    return Settings(candidates, data.get("best", {}), data.get("reasons", {}))


def store(best: dict[str, dict[str, str]], path: Path = FILE) -> None:
    """Write the best candidates below the mark; what people wrote above it stays as it is."""
    text, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    lines = []
    for engine in sorted(best):
        lines += ["", f"[best.{engine}]", *(f'{name} = "{best[engine][name]}"' for name in sorted(best[engine]))]
    path.write_text(text + (mark or f"\n{MARK}") + "\n".join([*lines, ""]), encoding="utf-8")
