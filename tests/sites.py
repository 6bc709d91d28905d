"""Folders of installed distributions, for tests of discovery."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


class Site:
    """A folder of installed distributions: what pip would leave behind, without pip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self, name: str, code: str | None, *, version="1.0", entries: dict[str, str] | None = None, entry_points=None
    ) -> str:
        """Write a one-module distribution with an entry point of the group ``folo`` and return the module's name."""
        module = name.replace("-", "_")
        if code is not None:
            (self.path / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        info = self.path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: About {name}.\n\n# {name}\n",
            encoding="utf-8",
        )
        lines = [f"{key} = {value}" for key, value in (entries or {name: module}).items()]
        text = entry_points if entry_points is not None else "\n".join(["[folo]", *lines, ""])
        (info / "entry_points.txt").write_text(text, encoding="utf-8")
        return module

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh interpreter that sees these distributions."""
        path = os.pathsep.join([str(self.path), *(entry for entry in sys.path if entry)])
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )


@pytest.fixture
def make_site(tmp_path, monkeypatch):
    """Make folders of installed distributions, each in front of ``sys.path``."""
    made = []

    def make() -> Site:
        site = Site(tmp_path / f"site{len(made)}")
        site.path.mkdir()
        made.append(site)
        monkeypatch.syspath_prepend(str(site.path))
        return site

    yield make
    for name, module in list(sys.modules.items()):
        with contextlib.suppress(AttributeError, TypeError):
            if Path(module.__file__).is_relative_to(tmp_path):
                del sys.modules[name]


@pytest.fixture
def site(make_site):
    """One such folder."""
    return make_site()
