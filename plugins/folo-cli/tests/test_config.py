"""``folo config``: what it prints loads again, every problem is printed, and nothing heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import attrs
import pytest
from typer.testing import CliRunner

from folo_cli import config as config_command
from folo_core.config import EngineConfig, load
from folo_core.plugins import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import ConfigMigrationSpec, ConfigSectionSpec


@attrs.frozen(kw_only=True)
class TraceSection:
    CONFIG_VERSION = 2

    width: int = 4


class TracePlugin:
    @hookimpl
    def folo_config_sections(self):
        return [ConfigSectionSpec(name="trace", help="Traces.", section_type=TraceSection)]

    @hookimpl
    def folo_config_migrations(self):
        def migrate(table):
            return {"width": table["wide"]}

        return [ConfigMigrationSpec(name="trace-1", help="wide", section="trace", from_version=1, migrate=migrate)]


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch):
    monkeypatch.setattr(config_command, "load_registry", lambda: load_registry(autoload=False, extra=[TracePlugin()]))


def run(*args, env=None):
    return CliRunner().invoke(config_command.app, list(map(str, args)), env=env)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "folo.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


EXPECTED = EngineConfig(model="demo", plugins={"trace": TraceSection()})


def test_show_prints_defaults_that_load_again():
    toml, as_json = run("show"), run("show", "--json")
    assert (toml.exit_code, as_json.exit_code) == (0, 0)
    assert load(tomllib.loads(toml.stdout), sections={"trace": TraceSection}) == EXPECTED
    assert load(json.loads(as_json.stdout), sections={"trace": TraceSection}) == EXPECTED


def test_show_layers_the_environment_over_the_file(write):
    path = write('[model]\nmodel = "x"\n[cache]\nblock_size = 8\n[plugins.trace]\nconfig_version = 1\nwide = 9\n')
    env = {"FOLO_CACHE__BLOCK_SIZE": "32"}
    tables = tomllib.loads(run("show", path, env=env).stdout)
    assert (tables["model"]["model"], tables["cache"]["block_size"]) == ("x", 32)
    assert tables["plugins"]["trace"] == {"config_version": 2, "width": 9}
    assert tomllib.loads(run("show", path, "--no-env", env=env).stdout)["cache"]["block_size"] == 8


def test_validate_prints_every_problem_and_exits_with_2(write):
    path = write('block_size = 3\n[model]\nmodel = ""\n[cache]\nblock_size = 7\n[plugins.trace]\nwidth = "x"\n')
    result = run("validate", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        "plugins.trace.width",
        "block_size",
        "model.model",
        "cache.block_size",
    ]


def test_validate_accepts_what_is_right(write):
    path = write('model = "demo"\n')
    result = run("validate", path, env={"FOLO_CACHE__BLOCK_SIZE": "7"})
    assert (result.exit_code, result.stdout) == (0, f"{path}: valid\n")
    assert run("validate", path, "--env", env={"FOLO_CACHE__BLOCK_SIZE": "7"}).exit_code == 2


def test_a_missing_file_and_a_null_that_toml_lacks_exit_with_2(tmp_path):
    assert "give a readable" in run("validate", tmp_path / "none.toml").stderr
    path = tmp_path / "a.json"
    path.write_text('{"model": "demo", "extra_config": {"a": null}}', encoding="utf-8")
    result = run("show", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "extra_config.a: None: TOML has no null; leave it out, or write JSON\n"
    assert run("show", path, "--json").exit_code == 0


def test_schema_lists_every_field():
    rows = {row["field"]: row for row in json.loads(run("schema", "--json").stdout)}
    assert rows["plugins.trace.width"]["default"] == 4
    assert rows["model.model"]["required"]
    lines = run("schema").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(rows)
    assert [line.split()[1] for line in lines if line.startswith("model.model ")] == ["required"]


@pytest.mark.parametrize("arguments", [["show"], ["schema"], ["show", "--json"]])
def test_the_real_command_imports_no_torch(arguments):
    code = (
        "import sys; from folo_core.cli.main import main; sys.argv = ['folo', 'config', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "block_size" in done.stdout
