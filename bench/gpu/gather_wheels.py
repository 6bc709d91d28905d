"""Gathers into a folder the wheels that a GPU machine without a network needs to run Folo.

Builds this repository's distributions, and downloads what they need that is not installed there:

    python3 -m pip list --format=freeze > installed.txt             # on the GPU machine
    python bench/gpu/gather_wheels.py wheels --installed installed.txt --python 3.12 --tests   # here

Wheels are fetched one by one, without what they depend on, so that nothing comes along that the machine has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[2]
LEFT_OUT = ("folo-demo-model",)
"""Distributions of ours that random weights can do without: this one holds 93 MB of them."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
"""Tags that pip tries: it takes each by itself, not what is older than one."""
MEBIBYTE = 2**20


@attrs.frozen(kw_only=True)
class Target:
    """The machine that the wheels are for."""

    python: str
    """Its Python, such as ``3.12``."""
    platforms: tuple[str, ...] = PLATFORMS
    without: frozenset[str] = frozenset()
    """Canonical names of what it can do without, whoever requires it."""
    installed: dict[str, Version | None] = attrs.field(factory=dict)
    """Versions of what it has, by canonical name; None where only the name is known, and any version counts."""

    def markers(self) -> dict[str, str]:
        """Return what conditions on requirements see."""
        found = {"python_version": self.python, "python_full_version": f"{self.python}.0", "sys_platform": "linux"}
        found |= {"platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython", "extra": ""}
        return found | {"platform_machine": "x86_64", "platform_python_implementation": "CPython"}

    def lacks(self, requirement: Requirement) -> bool:
        """Whether it needs a wheel for this requirement."""
        if requirement.marker is not None and not requirement.marker.evaluate(self.markers()):
            return False
        name = canonicalize_name(requirement.name)
        if name in self.without:
            return False
        if name not in self.installed:
            return True
        version = self.installed[name]
        return version is not None and not requirement.specifier.contains(version, prereleases=True)

    def download(self, requirement: Requirement, folder: Path) -> list[str]:
        """Return the command that fetches one wheel."""
        wanted = f"{requirement.name}{requirement.specifier}"
        options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        for platform in self.platforms:
            options += ["--platform", platform]
        return [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), wanted]


def read_installed(text: str) -> dict[str, Version | None]:
    """Read the lines of ``pip list``, in columns or with ``--format=freeze``, or bare names; others are passed over."""
    found: dict[str, Version | None] = {}
    for line in text.splitlines():
        match = re.match(r"^([A-Za-z0-9][\w.-]*)(?:(?:==|\s+)(\S+).*)?$", line.strip())
        try:
            if match:
                found[str(canonicalize_name(match[1]))] = Version(match[2]) if match[2] else None
        except InvalidVersion:
            continue
    return found


def sources(root: Path = ROOT) -> list[Path]:
    """Return the folders of the distributions to build: the core and every plugin but those left out."""
    plugins = sorted(path.parent for path in (root / "plugins").glob("*/pyproject.toml"))
    return [root, *(path for path in plugins if path.name not in LEFT_OUT)]


def build(folder: Path, run: Callable[[list[str]], None]) -> None:
    """Build our wheels anew; older ones would make two of one distribution."""
    for old in folder.glob("folo_*.whl"):
        old.unlink()
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", *options, *map(str, sources())])


def requirements_of(wheel: Path) -> Iterator[Requirement]:
    """Yield what a wheel says it requires, extras included: their markers tell them apart."""
    with ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist", []):
        try:
            yield Requirement(line)
        except InvalidRequirement as error:
            raise SystemExit(f"{wheel.name}: requires {line!r}, which cannot be read: {error}") from error


def complete(
    folder: Path, target: Target, also: Iterable[Requirement], run: Callable[[list[str]], None]
) -> list[Requirement]:
    """Download what the folder's wheels need and the machine lacks, then what those need; return what was asked for."""
    asked: list[Requirement] = []
    todo = [*also, *(need for wheel in sorted(folder.glob("*.whl")) for need in requirements_of(wheel))]
    while todo:
        need = todo.pop()
        if canonicalize_name(need.name) in by_name(folder) or not target.lacks(need):
            continue
        before = set(folder.glob("*.whl"))
        run(target.download(need, folder))
        asked.append(need)
        for wheel in set(folder.glob("*.whl")) - before:
            todo += requirements_of(wheel)
    return asked


def by_name(folder: Path) -> dict[str, Path]:
    """Return the folder's wheels by canonical name.

    Raises:
        SystemExit: there are two of one distribution, of which pip would install neither.
    """
    found: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name = str(parse_wheel_filename(wheel.name)[0])
        if name in found:
            raise SystemExit(f"{folder}: holds {found[name].name} and {wheel.name}: delete one of them")
        found[name] = wheel
    return found


def needs_of_tests(root: Path = ROOT) -> list[Requirement]:
    """Return the dependency group of the tests."""
    groups = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    return [Requirement(line) for line in groups["tests"]]


def report(folder: Path) -> str:
    """Return the wheels with their sizes, their sum, and the command that installs them."""
    wheels = by_name(folder).values()
    lines = [f"{wheel.stat().st_size / MEBIBYTE:8.2f} MiB  {wheel.name}" for wheel in wheels]
    total = sum(wheel.stat().st_size for wheel in wheels) / MEBIBYTE
    command = f"python3 -m pip install --no-index --no-deps --upgrade {folder}/*.whl"
    return "\n".join([*lines, f"{total:8.2f} MiB in {len(lines)} wheels; on the GPU machine:", command])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="where the wheels go")
    add("--installed", type=Path, metavar="FILE", help="lines of `pip list` from the GPU machine")
    add("--python", default="3.12", metavar="X.Y", help="its Python (default 3.12)")
    add("--platform", action="append", metavar="TAG", help="a platform tag it takes; repeatable (default manylinux)")
    add("--also", action="append", default=[], type=Requirement, metavar="NAME", help="one more wheel; repeatable")
    add("--without", action="append", default=[], metavar="NAME", help="leave out one that is required; repeatable")
    add("--tests", action="store_true", help="also what the tests need")
    add("--dry-run", action="store_true", help="print what would be run; without wheels there is less to see")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] | None = None) -> None:
    """Build, download and report."""
    args = parse(arguments)
    chosen = run or (print_command if args.dry_run else check_call)
    args.folder.mkdir(parents=True, exist_ok=True)
    installed = read_installed(args.installed.read_text(encoding="utf-8")) if args.installed else {}
    target = Target(
        python=args.python,
        installed=installed,
        without=frozenset(map(canonicalize_name, args.without)),
        platforms=tuple(args.platform or PLATFORMS),
    )
    build(args.folder, chosen)
    complete(args.folder, target, [*args.also, *(needs_of_tests() if args.tests else [])], chosen)
    print(report(args.folder))


def check_call(command: list[str]) -> None:
    """Run a command; its output is its own."""
    subprocess.run(command, check=True)


def print_command(command: list[str]) -> None:
    """Print a command in place of running it."""
    print(" ".join(command))


if __name__ == "__main__":
    main()
