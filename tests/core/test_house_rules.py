"""Rules about the sources themselves that no linter knows."""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "src" / "folo_core"
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
SOURCES = sorted([*CORE.rglob("*.py"), *(path for plugin in PLUGINS for path in (plugin / "src").rglob("*.py"))])
PREINSTALLED = {"folo-attention", "folo-cli", "folo-hf", "folo-sampling", "folo-schedulers"}
LIBRARIES = {"folo-kernels"}
"""Distributions that plugins are built on: no entry point, and they know nothing of the core."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(folder: Path) -> set[str]:
    return {re.match(r"[A-Za-z0-9-]+", line)[0] for line in project(folder)["dependencies"]}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_sources_are_found():
    assert len(SOURCES) > 60
    assert {plugin.name for plugin in PLUGINS} > PREINSTALLED


@pytest.mark.parametrize("sampler", ["greedy", "random"])
def test_samplers_stay_small(sampler):
    path = ROOT / "plugins" / "folo-sampling" / "src" / "folo_sampling" / f"{sampler}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150


def test_functions_stay_short():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{name(path)}: {node.name}")
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = sorted(length for length, _ in functions)
    assert max(functions)[0] <= 80, max(functions)
    assert statistics.median(lengths) < 12
    assert lengths[int(len(lengths) * 0.9)] < 35


@pytest.mark.parametrize("path", [path for path in SOURCES if CORE not in path.parents], ids=name)
def test_plugins_use_public_names_of_the_core(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "folo_core":
            used = [*node.module.split("."), *(alias.name for alias in node.names)]
            private = [part for part in used if part.startswith("_")]
            assert not private, f"line {node.lineno} uses {private} of the core"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_runs_code_from_data(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            assert not {"pickle", "marshal", "shelve", "dill"} & {alias.name for alias in node.names}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"torch.load", "eval", "exec"}, f"line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"


def test_all_distributions_have_one_version_and_licence():
    projects = [project(folder) for folder in (ROOT, *PLUGINS)]
    assert {(p["version"], p["license"], p["requires-python"]) for p in projects} == {("0.1.0", "Apache-2.0", ">=3.11")}
    texts = {(folder / "LICENSE").read_text(encoding="utf-8") for folder in (ROOT, *PLUGINS)}
    assert len(texts) == 1
    version = re.search(r'__version__ = "(.+)"', (CORE / "__init__.py").read_text(encoding="utf-8"))
    assert version[1] == projects[0]["version"]


@pytest.mark.parametrize("folder", PLUGINS, ids=name)
def test_each_plugin_is_a_distribution(folder):
    about = project(folder)
    package = folder.name.replace("-", "_")
    assert about["name"] == folder.name
    is_library = folder.name in LIBRARIES
    assert about.get("entry-points") == (None if is_library else {"folo": {folder.name: f"{package}.plugin"}})
    assert (folder / "src" / package / "py.typed").is_file()
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {folder.name}\n")
    assert list((folder / "tests").glob("test_*.py")), "a distribution brings its tests"
    assert ("folo-core" in requirements(folder)) is not is_library


def test_one_install_generates_text():
    assert requirements(ROOT) > PREINSTALLED
    assert project(ROOT)["optional-dependencies"]["demo"] == ["folo-demo-model>=0.1,<0.2"]


@pytest.mark.parametrize("folder", [ROOT, *PLUGINS], ids=lambda folder: folder.name)
def test_what_is_imported_is_required(folder):
    """Third-party modules that a distribution imports are among its own requirements, not its neighbours'."""
    provided = {"huggingface_hub": "huggingface-hub", "tomli_w": "tomli-w"}
    own = folder.name.replace("-", "_") if folder != ROOT else "folo_core"
    # Pytest and hypothesis are of folo_core.testing, which only test suites import; triton of kernels for CUDA devices:
    # it comes with torch where torch supports them.
    optional = {"pytest", "hypothesis", "triton"}
    standard = set(__import__("sys").stdlib_module_names)
    imported = set()
    for path in (folder / "src" / own).rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    needed = {provided.get(m, m).replace("_", "-") for m in imported - standard - {own} - optional}
    assert needed <= requirements(folder), sorted(needed - requirements(folder))
