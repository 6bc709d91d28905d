"""Sphinx settings, and the reference pages that are read off the code: configuration, parameters and commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import typer.main
from sphinx.pycode import ModuleAnalyzer

from folo_core.cli.main import commands
from folo_core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig, describe_fields
from folo_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sphinx.application import Sphinx

project = "Folo"
author = "The Folo authors"
project_copyright = "The Folo authors"
version = release = "0.1.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Signatures name classes of torch and of the standard library, whose pages are elsewhere.
nitpick_ignore_regex = [("py:.*", r".*")]

html_theme = "furo"
html_title = "Folo"

GENERATED = Path(__file__).parent / "reference" / "generated"


def cell(text: object) -> str:
    """One cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def field_table(cls: type) -> str:
    """Every field of an attrs class: default, what it accepts, and the docstring below it."""
    documented = ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
    texts = {name: " ".join(lines) for (owner, name), lines in documented.items() if owner == cls.__name__}
    own = {field.alias or field.name for field in attrs.fields(cls)}
    rows = [row for row in describe_fields(cls) if row["field"] in own]
    return table(
        ["field", "default", "meaning", "value"],
        (
            [
                f"`{row['field']}`",
                "required" if row["required"] else f"`{row['default']!r}`",
                texts.get(row["field"], ""),
                row["accepts"],
            ]
            for row in rows
        ),
    )


def configuration() -> str:
    """The page of all configuration fields."""
    page = [
        "# Configuration",
        "Flat keywords of `LLM(...)` go to their section; files and `FOLO_SECTION__FIELD` variables say which.",
        "`folo config schema` prints this page's content, plugin sections included.",
    ]
    for name, cls in {
        "model": ModelConfig,
        "cache": CacheConfig,
        "scheduler": SchedulerConfig,
        "parallel": ParallelConfig,
    }.items():
        page += [f"## `[{name}]`", field_table(cls)]
    return "\n\n".join([*page, "## Top level", field_table(EngineConfig)])


def parameters() -> str:
    """The page of SamplingParams."""
    return "\n\n".join(["# Sampling parameters", "Names, defaults and ranges are vLLM's.", field_table(SamplingParams)])


def command_section(words: str, command: Any) -> list[str]:  # noqa: ANN401 (click's command)
    """One command with its options, then its subcommands."""
    page = [f"## `{words}`", (command.help or "").strip()]
    rows = [
        [
            f"`{', '.join(parameter.opts)}`",
            "" if parameter.default is None or parameter.required else f"`{parameter.default}`",
            getattr(parameter, "help", None) or "",
        ]
        for parameter in command.params
        if parameter.name not in {"help", "install_completion", "show_completion"}
    ]
    if rows:
        page.append(table(["option", "default", "meaning"], rows))
    for name, child in getattr(command, "commands", {}).items():
        page += command_section(f"{words} {name}", child)
    return page


def command_line() -> str:
    """The page of the command line."""
    page = ["# Command line"]
    for name in sorted(commands()):
        page += command_section(f"folo {name}", typer.main.get_command(commands()[name].build()))
    return "\n\n".join(page)


def write_reference(app: Sphinx) -> None:  # noqa: ARG001 (Sphinx's callback)
    """Write the pages before Sphinx looks for sources."""
    GENERATED.mkdir(exist_ok=True)
    for name, text in {"configuration": configuration, "sampling-params": parameters, "commands": command_line}.items():
        (GENERATED / f"{name}.md").write_text(text() + "\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register the generator."""
    app.connect("builder-inited", write_reference)
