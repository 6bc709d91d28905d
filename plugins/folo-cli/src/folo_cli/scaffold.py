"""Writes the distribution of a new plugin from templates: a part that works, and tests that use the conformance kit."""

from __future__ import annotations

import enum
import importlib.util
import keyword
import re
import string
from importlib import metadata, resources
from typing import TYPE_CHECKING

from folo_core.errors import PluginError

if TYPE_CHECKING:
    from pathlib import Path

NEW_NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
"""Names a new distribution may have: lower case, digits and single hyphens."""


class Kind(enum.Enum):
    """What a scaffolded plugin offers."""

    SAMPLER = "sampler"
    STRATEGY = "strategy"
    LOGITS_PROCESSOR = "logits-processor"
    SCHEDULER = "scheduler"


_MODULES = {
    Kind.SAMPLER: "sampler",
    Kind.STRATEGY: "sampler",
    Kind.LOGITS_PROCESSOR: "processor",
    Kind.SCHEDULER: "scheduler",
}


def create_plugin(name: str, kind: Kind, directory: Path) -> tuple[Path, list[str]]:
    """Write ``directory/name`` and return it with the files in it, relative to it.

    Everything is rendered before anything is written.

    Raises:
        PluginError: the name is malformed or taken, or the folder exists.
        OSError: the folder cannot be written.
    """
    package = _check_name(name)
    project = directory / name
    if project.exists() or project.is_symlink():
        raise PluginError(f"{project}: exists already: choose another name or --directory", plugin=name)
    files = render_plugin(name, package, kind)
    for path, text in files.items():
        target = project / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
    return project, sorted(files)


def render_plugin(name: str, package: str, kind: Kind) -> dict[str, str]:
    """Relative path to text of every file of the distribution."""
    part = name.removeprefix("folo-")
    values = {
        "name": name,
        "package": package,
        "part": part,
        "part_ident": part.replace("-", "_"),
        "class_name": "".join(word.capitalize() for word in part.split("-")),
        "kind": kind.value,
        "module": _MODULES[kind],
        "core": ".".join(_core_version().split(".")[:2]),
    }
    sources = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{package}/__init__.py": "__init__.py",
        f"src/{package}/py.typed": "py.typed",
        f"src/{package}/plugin.py": f"{kind.value}/plugin.py",
        f"src/{package}/{_MODULES[kind]}.py": f"{kind.value}/{_MODULES[kind]}.py",
        f"tests/test_{package}.py": f"{kind.value}/test.py",
    }
    if kind in {Kind.SAMPLER, Kind.STRATEGY}:
        sources[f"src/{package}/params.py"] = f"{kind.value}/params.py"
    return {path: string.Template(_template(source)).substitute(values) for path, source in sources.items()}


def _template(path: str) -> str:
    return resources.files("folo_cli").joinpath("templates", f"{path}.tmpl").read_text(encoding="utf-8")


def _core_version() -> str:
    try:
        return metadata.version("folo-core")
    except metadata.PackageNotFoundError:
        return "0.1"


def _check_name(name: str) -> str:
    """Return the import package's name for a distribution's, or refuse it."""
    package = name.replace("-", "_")
    if not re.fullmatch(NEW_NAME, name):
        raise PluginError(f"name: {name!r}: use lower-case letters, digits and single hyphens, such as folo-dice")
    if name == "folo" or not name.removeprefix("folo-")[0].isalpha():
        raise PluginError(f"name: {name!r}: what follows 'folo-' names the part and must begin with a letter")
    installed = any(True for _ in metadata.Distribution.discover(name=name))
    if installed or keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        raise PluginError(f"name: {name!r}: a package or distribution of this name is installed: choose another")
    return package
