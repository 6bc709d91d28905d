# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.2.9"]
# ///
"""Everything that is ever run on this repository. Nothing but Python and pip is needed to start: ``nox -s demo``."""

from __future__ import annotations

import os
import re
import shutil
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "imports", "wheels", "tests"]

ROOT = Path(__file__).parent
WORK = ROOT / ".nox"
SHARED = WORK / "shared"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

PREINSTALLED = ["folo-cli", "folo-hf", "folo-sampling", "folo-schedulers", "folo-attention"]
LIBRARIES = ["folo-kernels"]  # plugins are built on them; they offer no hook of their own
STRATEGIES = ["folo-best-of", "folo-beam", "folo-speculative", "folo-guidance", "folo-tree-search"]
PLUGINS = [*LIBRARIES, *PREINSTALLED, *STRATEGIES, "folo-flashinfer", "folo-trace", "folo-demo-model"]
SUITES = {
    "core": ["tests/core"],
    **{name: [f"plugins/{name}/tests"] for name in PLUGINS},
    "docs": ["tests/docs", "tests/bench"],
    "end-to-end": ["tests/end_to_end", "tests/third_party"],
}
MEASURED = "core"
"""The suite that measures coverage: tracing takes as long as a Python test itself, and no other suite is needed."""

NO_COMPILE = "--no-compile"
"""Modules are compiled when they are first imported: of torch and transformers, most never are."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_prepared: set[Path] = set()


def group(name: str) -> list[str]:
    """Requirements of one dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PROJECT, name)


def third_party_folders() -> list[str]:
    """Distributions that stand for those of other people: tests use them, and nothing of ours knows them."""
    return sorted(str(path.parent) for path in (ROOT / "tests" / "third_party").glob("*/pyproject.toml"))


def shared(session: nox.Session, *command: str, env: dict[str, str] | None = None) -> None:
    """Run a command in the environment that most sessions share, filled on first use.

    It holds every distribution, editable, and the test tools. Torch takes hundreds of megabytes, so one copy serves
    all sessions whose result does not depend on a clean environment; ``wheels`` and ``lowest``, whose result does,
    have their own. Delete the folder to start afresh.
    """
    if not _prepared:
        _prepared.add(SHARED)
        if not SHARED.is_dir():
            session.run(sys.executable, "-m", "venv", str(SHARED), external=True)
        install = ("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", NO_COMPILE)
        tools = [*group("build"), *group("tests"), *group("types")]
        shared(session, *install, "-c", "constraints.txt", "pip>=25", *tools)
        folders = [*(f"plugins/{name}" for name in PLUGINS), *third_party_folders()]
        editable = [part for folder in folders for part in ("-e", folder)]
        # Core and its preinstalled plugins need each other, so they are named in one command.
        shared(session, *install, "--no-build-isolation", "-c", "constraints.txt", "-e", ".", *editable)
    folder = SHARED / ("Scripts" if os.name == "nt" else "bin")
    environment = {**OFFLINE, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    session.run(str(folder / command[0]), *command[1:], env=environment, external=True)


def run_suite(session: nox.Session, *names: str) -> None:
    """Run the tests of these distributions together; the core's also measure which of its lines and branches ran."""
    reports = WORK / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    folders = [folder for name in names for folder in SUITES[name] if (ROOT / folder).is_dir()]
    # A file's tests stay together, because they share loaded models; more workers would each load their own.
    count = min(4, os.cpu_count() or 1)
    workers = ["-n", str(count), "--dist", "loadfile"]
    # Each worker computes on its share of the cores: threads that wait for each other must not wait for a core.
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    report = reports / f"{names[0] if len(names) == 1 else 'others'}.xml"
    command = ["pytest", *workers, "-m", "not gpu", f"--junitxml={report}"]
    if MEASURED in names:
        for old in reports.glob(".coverage*"):
            old.unlink()
        command = ["coverage", "run", "-m", *command]
        environment["COVERAGE_FILE"] = str(reports / ".coverage")
    shared(session, *command, *folders, *session.posargs, env=environment)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Install Folo with its embedded model, stream an answer and print how fast it came."""
    prompt = " ".join(session.posargs) or "Explain in three sentences why the sky is blue."
    shared(session, "folo", "generate", prompt, "--model", "demo", "--chat", "--max-tokens", "96")


@nox.session(venv_backend="none")
@nox.parametrize("part", ["core", "others"], ids=["core", "others"])
def tests(session: nox.Session, part: str) -> None:
    """Test everything: the core, whose coverage is judged, and all other distributions in one run of pytest."""
    run_suite(session, *([MEASURED] if part == "core" else [name for name in SUITES if name != MEASURED]))
    if part == "core":
        session.notify("coverage")


@nox.session(venv_backend="none")
@nox.parametrize("suite", list(SUITES), ids=list(SUITES))
def suite(session: nox.Session, suite: str) -> None:
    """Test one distribution: ``suite(folo-sampling)``."""
    run_suite(session, suite)


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Judge how much of the core its own tests ran; the threshold stands in pyproject.toml."""
    reports = WORK / "reports"
    combined = {"COVERAGE_FILE": str(reports / "combined")}
    data = sorted(str(path) for path in reports.glob(".coverage.*"))
    shared(session, "coverage", "combine", "--keep", "-q", *data, env=combined)
    # With options, as of ``nox -s tests -- -k fork``, not all of them ran.
    shared(session, "coverage", "report", *(["--fail-under=0"] if session.posargs else []), env=combined)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, with the torch build that suits it."""
    shared(session, "pytest", "-m", "gpu", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff with every rule on; what is off says why in pyproject.toml."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict, over the core and every plugin."""
    sources = ["src/folo_core", *(f"plugins/{name}/src/{name.replace('-', '_')}" for name in PLUGINS)]
    shared(session, "mypy", *sources)


@nox.session
def imports(session: nox.Session) -> None:
    """Import contracts: the layers, no torch and no pluggy where they do not belong, no source across plugins."""
    session.install(*group("imports"))
    sources = [str(ROOT / "src"), *(str(ROOT / "plugins" / name / "src") for name in PLUGINS)]
    environment = {"PYTHONPATH": os.pathsep.join(sources)}
    session.run("lint-imports", "--cache-dir", str(WORK / "import-linter"), env=environment)


def third_party_requirements(wheelhouse: Path) -> list[str]:
    """Requirements of our wheels that are not ours, so that ours can then be installed from the wheelhouse alone."""
    wanted: set[str] = set()
    for wheel in wheelhouse.glob("*.whl"):
        with ZipFile(wheel) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(archive.read(name).decode())
        wanted.update(line for line in metadata.get_all("Requires-Dist", []) if not line.startswith("folo-"))
    return sorted(line for line in wanted if "extra ==" not in line)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every distribution, install from the wheelhouse alone, and generate text with no source in sight."""
    wheelhouse = Path(session.create_tmp()).resolve() / "wheelhouse"
    shutil.rmtree(wheelhouse, ignore_errors=True)
    sources = [str(ROOT), *(str(ROOT / "plugins" / name) for name in PLUGINS), *third_party_folders()]
    session.install("pip>=25", *group("build"))
    session.run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheelhouse), *sources)
    session.install(NO_COMPILE, "-c", "constraints.txt", *third_party_requirements(wheelhouse))
    outside = wheelhouse.parent / "elsewhere"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    names = sorted(wheel.name.split("-")[0].replace("_", "-") for wheel in wheelhouse.glob("folo*.whl"))
    session.install("--no-index", "--no-deps", "--force-reinstall", "--find-links", str(wheelhouse), *names)
    session.run("pip", "check")
    check = outside / "check_installed.py"
    shutil.copy(ROOT / "tests" / "packaging" / "check_installed.py", check)
    session.chdir(outside)
    session.run("python", "-I", str(check), str(ROOT), env={**OFFLINE, "XDG_CACHE_HOME": str(outside / "cache")})


def lowest_pins() -> list[str]:
    """``name==lowest`` for each direct requirement of every distribution, ours and torch excepted."""
    projects = [PROJECT, *(nox.project.load_toml(ROOT / "plugins" / name / "pyproject.toml") for name in PLUGINS)]
    lines = {line for project in projects for line in project["project"]["dependencies"]}
    found = (re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?>=([0-9.]+)", line) for line in lines)
    pins = {match[1]: match[2] for match in found if match and match[1] != "torch" and not match[1].startswith("folo-")}
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the suites on the lowest versions that the distributions say they work with.

    Torch stays at the version of constraints.txt: of its lowest version only builds with CUDA are published.
    """
    session.install("pip>=25", *group("build"), *group("tests"), *lowest_pins(), "-c", "constraints.txt")
    folders = [*(f"plugins/{name}" for name in PLUGINS), *third_party_folders()]
    editable = [part for folder in folders for part in ("-e", folder)]
    pins = Path(session.create_tmp()).resolve() / "lowest.txt"
    pins.write_text("\n".join([*lowest_pins(), *(ROOT / "constraints.txt").read_text().split()]) + "\n")
    session.install("--no-build-isolation", "-c", str(pins), "-e", ".", *editable)
    for folders in SUITES.values():
        present = [folder for folder in folders if (ROOT / folder).is_dir()]
        session.run("pytest", "-q", "-m", "not gpu", *present, *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error. Its code is run by the tests in tests/docs."""
    shared(session, "python", "-m", "pip", "install", "--quiet", *group("docs"))
    target = WORK / "site"
    shared(session, "sphinx-build", "-W", "--keep-going", "-n", "-b", "html", "docs", str(target))
    session.log(f"open {target / 'index.html'}")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Print what hooks, validation, sampling, forks and scheduling cost. ``-- NAME`` runs one of them."""
    shared(session, "python", "bench/run_all.py", *session.posargs)


@nox.session(venv_backend="none")
def peers(session: nox.Session) -> None:
    """Measure Folo beside other engines on this processor; each gets an environment of its own on first use.

    ``-- --workloads C1,C2 --engines folo,vllm --rounds 3`` measures some of them; docs/how-to says more.
    """
    if any(argument.startswith("--plot") for argument in session.posargs):
        shared(session, "python", "-m", "pip", "install", "--quiet", *group("bench"))
    shared(session, "python", "bench/cpu/run.py", *session.posargs)


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """Nightly: a million random operations on KV memory and 300 random runs of an engine, each checked in full."""
    machines = ["tests/core/test_memory_machine.py", "tests/core/test_engine_machine.py"]
    environment = {"FOLO_SOAK": "1_000_000", "FOLO_SOAK_RUNS": "300"}
    shared(session, "pytest", "-s", *machines, *session.posargs, env=environment)


@nox.session(venv_backend="none")
def mutants(session: nox.Session) -> None:
    """Nightly: break the block pool and the schedulers in every small way, and see whether a test notices.

    ``-- --sample 300 --seed 7`` tries some of them, ``-- --only '*planner*'`` those of one module.
    """
    shared(session, "python", "-m", "pip", "install", "--quiet", *group("mutants"))
    shared(session, "python", "bench/mutants.py", *session.posargs)
