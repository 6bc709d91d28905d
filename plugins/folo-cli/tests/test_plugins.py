from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from folo_cli.plugins import app
from folo_cli.scaffold import Kind, create_plugin
from folo_core.errors import PluginError

SAMPLER = '''
    import attrs
    from folo_core.plugins import hookimpl
    from folo_core.plugins.specs import SamplerSpec
    from folo_core.sampling_params import SamplingParams

    @attrs.frozen(slots=True, kw_only=True)
    class AcmeParams(SamplingParams):
        """Options of acme."""

        depth: int = 3
        """How deep to look."""
        weights: tuple = attrs.field(factory=tuple)
        """One per level."""

    @hookimpl
    def folo_samplers():
        """Offer acme."""
        return [
            SamplerSpec(
                name="acme",
                help="Acme decoding.",
                factory=print,
                params_type=AcmeParams,
                capabilities={"logprobs", "deterministic"},
            )
        ]
'''


@pytest.fixture
def run():
    def invoke(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.fixture
def three(site, monkeypatch):
    """A good, a broken and a blocked plugin."""
    site.install("acme-good", SAMPLER, version="1.2")
    site.install("acme-broken", "import no_such_module_anywhere")
    site.install("acme-blocked", "raise AssertionError('imported')")
    monkeypatch.setenv("FOLO_BLOCK", "acme-blocked")
    return site


@pytest.mark.usefixtures("three")
def test_list_shows_good_broken_and_blocked(run):
    rows = {line.split("  ")[0]: line for line in run("list").splitlines()}
    assert "acme-good 1.2" in rows["acme-good"]
    assert rows["acme-good"].endswith("loaded   samplers: acme")
    assert "broken   ModuleNotFoundError: No module named 'no_such_module_anywhere'" in rows["acme-broken"]
    assert rows["acme-blocked"].endswith("blocked  by FOLO_BLOCK")
    assert rows["folo-core"].endswith("executors: in-process")


@pytest.mark.usefixtures("three")
def test_list_as_json(run):
    rows = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert rows["acme-good"] == {
        "name": "acme-good",
        "distribution": "acme-good",
        "version": "1.2",
        "status": "loaded",
        "summary": "About acme-good.",
        "parts": {"samplers": ["acme"]},
    }
    assert rows["acme-broken"]["status"] == "broken"
    assert rows["acme-broken"]["problem"] == "import"
    assert rows["acme-blocked"]["reason"] == "FOLO_BLOCK"
    assert list(rows) == sorted(rows)


@pytest.mark.usefixtures("three")
def test_show_gives_hooks_parts_and_documented_options(run):
    text = run("show", "acme-good")
    assert "acme-good (acme-good 1.2), loaded" in text
    assert "folo_samplers" in text
    assert "acme: Acme decoding." in text
    assert "depth: int = 3  How deep to look." in text
    assert "capabilities: deterministic, logprobs" in text
    assert "temperature" not in text  # inherited options are SamplingParams' own business


@pytest.mark.usefixtures("three")
def test_show_as_json(run):
    shown = json.loads(run("show", "acme-good", "--json"))
    [part] = shown["hooks"]["folo_samplers"]
    assert part["capabilities"] == ["deterministic", "logprobs"]
    assert part["params"]["doc"] == "Options of acme."
    assert part["params"]["fields"] == [
        {"name": "depth", "type": "int", "default": 3, "required": False, "doc": "How deep to look."},
        {
            "name": "weights",
            "type": "tuple",
            "default": "(built per object)",
            "required": False,
            "doc": "One per level.",
        },
    ]


@pytest.mark.usefixtures("three")
def test_show_explains_broken_and_blocked_plugins(run):
    assert "no_such_module_anywhere" in run("show", "acme-broken")
    assert "FOLO_BLOCK" in run("show", "acme-blocked")
    assert json.loads(run("show", "acme-broken", "--json"))["problem"] == "import"


@pytest.mark.usefixtures("three")
def test_show_of_an_unknown_name_lists_what_there_is(run):
    with pytest.raises(PluginError, match=r"no plugin or distribution is called 'nope'; installed: .*acme-good"):
        run("show", "nope")


def test_doctor_is_content_with_a_sound_installation(site, run, monkeypatch):
    site.install("acme-good", SAMPLER)
    monkeypatch.setenv("FOLO_AUTOLOAD", "0")
    assert run("doctor") == "All plugins are well.\n"
    assert json.loads(run("doctor", "--json")) == {"ok": True, "findings": []}


def test_doctor_finds_everything_that_is_wrong(make_site, run, monkeypatch):
    hidden, site = make_site(), make_site()
    hidden.install("acme-good", SAMPLER, version="0.1")
    site.install("acme-good", SAMPLER, version="0.2")
    site.install("acme-broken", "import no_such_module_anywhere")
    site.install("acme-misspelt", SAMPLER.replace("folo_samplers", "folo_sampler"))
    site.install("acme-old", SAMPLER.replace('name="acme",', 'name="acme", api_version=0,'))
    site.install("acme-clash", SAMPLER)
    site.install("acme-blocked", "raise AssertionError('imported')")
    monkeypatch.setenv("FOLO_BLOCK", "acme-blocked,acme-typo")
    findings = json.loads(run("doctor", "--json", code=1))["findings"]
    mine = [(f["kind"], f["plugin"] or f["distribution"]) for f in findings if "acme" in f["message"]]
    assert sorted(mine) == [
        ("api-version", "acme-old"),
        ("clash", "acme-clash acme-good"),
        ("hooks", "acme-misspelt"),
        ("import", "acme-broken"),
        ("shadowed", "acme-good"),
        ("unknown-block", "acme-typo"),
    ]
    text = run("doctor", code=1)
    assert "did you mean 'folo_samplers'?" in text
    assert 'choose with "acme-clash:acme" or "acme-good:acme"' in text
    assert "made for plugin API 0" in text
    assert "0.1 in" in text
    assert "acme-blocked" not in text


TYPER = "import sys; from folo_cli.plugins import app; app({arguments!r}, standalone_mode=False)"


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "folo-core"], ["--help"]])
def test_listing_imports_no_torch(site, arguments):
    done = site.run(TYPER.format(arguments=arguments) + "\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "folo-core" in done.stdout or "doctor" in done.stdout


def test_doctor_names_a_plugin_that_imports_torch_at_its_entry_point(site):
    (site.path / "torch.py").write_text("")  # a stand-in: what counts is the name
    site.install("acme-heavy", "import torch\n" + SAMPLER.replace("\n    ", "\n"))
    done = site.run(TYPER.format(arguments=["doctor"]))
    assert "heavy: plugin acme-heavy imports torch with its entry point" in done.stdout


# --- new -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Folo-Dice", "lower-case"),
        ("folo_dice", "lower-case"),
        ("folo--dice", "lower-case"),
        ("../dice", "lower-case"),
        ("", "lower-case"),
        ("folo-dice\n", "lower-case"),
        ("folo", "must begin with a letter"),
        ("folo-2x", "must begin with a letter"),
        ("lambda", "is installed"),
        ("json", "is installed"),
        ("pluggy", "is installed"),
    ],
)
def test_new_refuses_bad_and_taken_names(tmp_path, name, message):
    with pytest.raises(PluginError, match=message):
        create_plugin(name, Kind.SAMPLER, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_new_refuses_the_name_of_an_installed_distribution(tmp_path, site):
    site.install("acme-taken", None)
    with pytest.raises(PluginError, match="is installed"):
        create_plugin("acme-taken", Kind.SAMPLER, tmp_path)


def test_new_refuses_an_existing_folder_and_leaves_it_alone(tmp_path, run):
    (tmp_path / "acme-dice").mkdir()
    with pytest.raises(PluginError, match="exists already"):
        run("new", "acme-dice", "--directory", str(tmp_path))
    assert list((tmp_path / "acme-dice").iterdir()) == []


def test_new_says_when_it_cannot_write(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError, match=r"--directory: .* cannot be written"):
        run("new", "acme-dice", "--directory", str(tmp_path / "file"))


def test_new_reports_what_it_wrote(tmp_path, run):
    written = json.loads(run("new", "acme-dice", "--directory", str(tmp_path), "--json"))
    assert written["path"] == str(tmp_path / "acme-dice")
    on_disk = sorted(str(p.relative_to(tmp_path / "acme-dice")) for p in tmp_path.rglob("*") if p.is_file())
    assert written["files"] == on_disk
    assert "src/acme_dice/plugin.py" in on_disk
    text = run("new", "acme-cards", "--kind", "scheduler", "--directory", str(tmp_path))
    assert "python -m pip install -e '.[test]'" in text


def test_every_kind_of_new_plugin_works_and_passes_its_own_tests(tmp_path, site):
    folders = []
    for kind in Kind:
        name = f"acme-new-{kind.value}"
        project, _ = create_plugin(name, kind, tmp_path)
        package = name.replace("-", "_")
        site.install(name, None, entries={name: f"{package}.plugin"})
        assert f'{name} = "{package}.plugin"' in (project / "pyproject.toml").read_text()
        (site.path / package).symlink_to(project / "src" / package)
        folders.append(str(project / "tests"))
    listed = site.run(TYPER.format(arguments=["list", "--json"]))
    status = {row["name"]: row["status"] for row in json.loads(listed.stdout)}
    assert [status[f"acme-new-{kind.value}"] for kind in Kind] == ["loaded"] * len(Kind)
    arguments = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *folders]
    done = site.run(f"import sys, pytest; sys.exit(pytest.main({arguments!r}))", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "75 passed, 1 skipped" in done.stdout
    assert "warning" not in done.stdout


def test_a_new_plugin_passes_the_kit_from_an_empty_folder(tmp_path, site):
    (tmp_path / "empty").mkdir()
    options = []
    for kind in (Kind.SAMPLER, Kind.STRATEGY, Kind.LOGITS_PROCESSOR):
        name = f"acme-kit-{kind.value}"
        package = name.replace("-", "_")
        project, _ = create_plugin(name, kind, tmp_path)
        site.install(name, None, entries={name: f"{package}.plugin"})
        (site.path / package).symlink_to(project / "src" / package)
        options += ["--folo-conformance", name]
    arguments = ["-q", "-p", "no:cacheprovider", *options]
    code = f"import os, sys, pytest; os.chdir({str(tmp_path / 'empty')!r}); sys.exit(pytest.main({arguments!r}))"
    done = site.run(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "58 passed, 1 skipped" in done.stdout


def test_new_files_are_sound_python(tmp_path):
    for kind in Kind:
        project, files = create_plugin(f"acme-parse-{kind.value}", kind, tmp_path)
        for path in files:
            text = (project / path).read_text()
            assert "$" not in text
            if path.endswith(".py"):
                compile(text, path, "exec")
            if path.endswith(".toml"):
                tomllib = sys.modules.get("tomllib") or __import__("tomllib")
                assert tomllib.loads(text)["project"]["name"] == f"acme-parse-{kind.value}"
