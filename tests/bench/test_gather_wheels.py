"""Gathering wheels for a machine without a network: which are fetched, with a pip that only pretends."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import gather_wheels
from gather_wheels import Target


def wheel(folder, name, *needs, version="1.0"):
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


class Pip:
    """Writes the wheels that a command asks for, and notes the commands."""

    def __init__(self, index):
        self.index = index
        self.commands = []

    def __call__(self, command):
        self.commands.append(command)
        if "download" in command:
            name = Requirement(command[-1]).name
            wheel(Path(command[command.index("-d") + 1]), name, *self.index[name])
        else:
            folder = Path(command[command.index("-w") + 1])
            wheel(folder, "folo-core", "needed>=2", "present>=1", "folo-plugin", 'windows; sys_platform == "win32"')
            wheel(folder, "folo-plugin", "folo-core", 'more; extra == "all"', 'old; python_version < "3.12"')

    def downloaded(self):
        return [command[-1] for command in self.commands if "download" in command]


@pytest.fixture
def pip():
    return Pip({"needed": ["deeper!=3"], "deeper": [], "present": [], "extra-tool": []})


def gather(folder, pip, *arguments, installed="present 1.5\n"):
    known = folder.parent / "installed.txt"
    known.write_text(installed)
    gather_wheels.main([str(folder), "--installed", str(known), *arguments], run=pip)


def test_only_what_the_machine_lacks_is_fetched_and_what_that_needs(tmp_path, pip, capsys):
    gather(tmp_path / "wheels", pip)
    assert pip.downloaded() == ["needed>=2", "deeper!=3"]
    shown = capsys.readouterr().out
    assert "MiB in 4 wheels" in shown
    assert f"pip install --no-index --no-deps --upgrade {tmp_path / 'wheels'}/*.whl" in shown


def test_a_version_that_is_too_old_counts_as_lacking(tmp_path, pip):
    gather(tmp_path / "wheels", pip, installed="present==0.9\nneeded==2.1\n")
    assert pip.downloaded() == ["present>=1"]


def test_a_bare_name_counts_as_any_version(tmp_path, pip):
    gather(tmp_path / "wheels", pip, installed="present\nneeded\n")
    assert pip.downloaded() == []


def test_more_can_be_asked_for(tmp_path, pip):
    gather(tmp_path / "wheels", pip, "--also", "extra-tool==1.0", installed="present 1\nneeded 2\n")
    assert pip.downloaded() == ["extra-tool==1.0"]


def test_what_a_requirement_requires_can_be_left_out(tmp_path, pip):
    gather(tmp_path / "wheels", pip, "--without", "Deeper")
    assert pip.downloaded() == ["needed>=2"]


def test_each_download_is_for_the_other_machine(tmp_path, pip):
    gather(tmp_path / "wheels", pip, "--python", "3.13", "--platform", "linux_x86_64")
    command = next(command for command in pip.commands if "download" in command)
    assert "--no-deps" in command
    assert "--only-binary=:all:" in command
    assert command[command.index("--python-version") + 1] == "3.13"
    assert command[command.index("--platform") + 1] == "linux_x86_64"


def test_our_wheels_are_built_anew_without_the_demo_model(tmp_path, pip):
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "folo-core", version="0.0.1")
    gather(folder, pip)
    built = pip.commands[0]
    assert str(gather_wheels.ROOT) in built
    assert any(part.endswith("plugins/folo-hf") for part in built)
    assert not any("demo-model" in part for part in built)
    assert [path.name for path in folder.glob("folo_core*")] == ["folo_core-1.0-py3-none-any.whl"]


def test_two_wheels_of_one_distribution_are_refused(tmp_path):
    wheel(tmp_path, "needed", version="1.0")
    wheel(tmp_path, "needed", version="2.0")
    with pytest.raises(SystemExit, match="delete one of them"):
        gather_wheels.by_name(tmp_path)


def test_a_dry_run_prints_commands_and_runs_none(tmp_path, capsys):
    gather_wheels.main([str(tmp_path), "--dry-run", "--also", "hypothesis>=6"])
    shown = capsys.readouterr().out
    assert "pip wheel -q --no-deps" in shown
    assert "hypothesis>=6" in shown
    assert not list(tmp_path.glob("*.whl"))


def test_lists_of_pip_are_read_in_both_forms():
    text = "Package Version\n------- -------\nAttrs   25.1\nfolo-core 0.1.0 /src/editable\nruamel.yaml==0.18\nweird @ file:///x\n"
    found = gather_wheels.read_installed(text)
    assert found == {"attrs": Version("25.1"), "folo-core": Version("0.1.0"), "ruamel-yaml": Version("0.18")}


def test_what_the_tests_need_stands_in_pyproject():
    assert {need.name for need in gather_wheels.needs_of_tests()} >= {"pytest", "hypothesis"}


def test_conditions_are_those_of_the_other_machine():
    target = Target(python="3.12")
    assert target.lacks(Requirement('x; python_version >= "3.12" and sys_platform == "linux"'))
    assert not target.lacks(Requirement('x; sys_platform == "darwin"'))
    assert not target.lacks(Requirement('x; extra == "all"'))
