"""The documentation's code runs, and the commands that it shows exist.

- All ``python`` blocks of a page run in order, in one namespace, in an empty folder.
- A ``python`` block whose first line is ``# file: NAME`` is written to that file instead and can be imported.
- A ``toml`` block with an entry point makes the folder an installed distribution with it.
- A ``text`` block that follows a ``python`` block is what the block prints.
- Each ``folo`` command in a ``console`` or ``bash`` block names a subcommand and options that exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from folo_core.cli.main import app, commands

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "plugins").glob("*/README.md"),
    ]
)
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(kind == language for kind, _ in blocks(page))]


def folo_commands(page: Path) -> list[list[str]]:
    found = []
    for kind, text in blocks(page):
        if kind in {"console", "bash"}:
            lines = text.replace("\\\n", " ").splitlines()
            found += [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words[:1] == ["folo"]]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_is_something_to_run():
    assert len(pages_with("python")) >= 4
    assert sum(len(folo_commands(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    namespace = {"__name__": "docs"}
    printed = None
    for number, (kind, text) in enumerate(blocks(page)):
        named_file = FILE.match(text)
        if kind == "python" and named_file:
            file = tmp_path / named_file[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif kind == "toml" and "entry-points" in text:
            install(tmp_path, tomllib.loads(text))
        elif kind == "python":
            code = compile(text, f"{page.name}, block {number}", "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)  # noqa: S102 (the repository's own documentation)
            printed = output.getvalue()
        elif kind == "text" and printed is not None:
            assert text == printed, f"{page.name}, block {number}: it prints something else"
    for module in set(sys.modules) - before:
        if (getattr(sys.modules[module], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[module]


def install(folder: Path, pyproject: dict) -> None:
    """Write what pip would: the metadata of a distribution with these entry points."""
    info = folder / "page-1.0.dist-info"
    info.mkdir()
    about = "Metadata-Version: 2.1\nName: page\nVersion: 1.0\nSummary: A page.\n\n# page\n"
    (info / "METADATA").write_text(about, encoding="utf-8")
    lines = []
    for group, entries in pyproject["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if folo_commands(page)], ids=name)
def test_commands_exist(page):
    for words in folo_commands(page):
        command, rest = typer.main.get_command(app), words[1:]
        if rest[0] in commands():
            command = typer.main.get_command(commands()[rest.pop(0)].build())
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        assert rest[:1] == [] or command.params, f"{shlex.join(words)}: no such command"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help"}, f"{shlex.join(words)}: no such option: {sorted(used - known)}"
