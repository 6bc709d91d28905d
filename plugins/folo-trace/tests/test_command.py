"""``folo trace`` from end to end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from engines import SamplerPlugin, TreeParams, TreeSampler
from folo_core.cli import main as main_module
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer
from folo_trace import command

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fake model and a test strategy stand among the installed plugins."""
    open_model = command.open_model
    plugins = [FakePlugin(FakeModel(), FakeTokenizer()), SamplerPlugin(TreeSampler(), TreeParams)]
    monkeypatch.setattr(command, "open_registry", lambda recorder: load_registry(extra=[recorder, *plugins]))
    settings = {"loader": "fake", "attention": "fake", "num_blocks": 256, "block_size": 4}
    monkeypatch.setattr(command, "open_model", lambda registry, options: open_model(registry, settings | options))


def folo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["folo", "trace", *arguments, "--model", "fake"])
    try:
        main_module.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return 0


def test_it_writes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "tree.html"
    assert folo(monkeypatch, "abc", "--strategy", "test", "-O", "width=3", "--max-tokens", "6", "-o", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert '"strategy":"test-sampler:test"' in text
    assert '"params":{"max_tokens":6,"width":3}' in text
    assert '"model":"fake"' in text
    assert "tokens sampled and" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--json", "-o", "x.data"], ["-o", "x.json"]])
def test_it_writes_data(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert folo(monkeypatch, "abc", "--block-size", "2", *arguments) == 0
    run = json.loads((tmp_path / arguments[-1]).read_text(encoding="utf-8"))
    assert run["block_size"] == 2
    assert run["strategy"] == "folo-sampling:greedy"


def test_it_prints_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert folo(monkeypatch, "-", "--json", "--temperature", "0.7", "--seed", "5") == 0
    run = json.loads(capsys.readouterr().out)
    assert run["prompt"]["text"] == "from a pipe"
    assert run["params"] == {"temperature": 0.7, "seed": 5, "max_tokens": 24}
    assert run["strategy"] == "folo-sampling:random"


def test_the_page_is_trace_html_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert folo(monkeypatch, "abc") == 0
    assert (tmp_path / "trace.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategy", "test", "-O", "widht=3"], "did you mean 'width'?"),
        (["--strategy", "test", "-O", "width"], "write FIELD=VALUE"),
        (["--strategy", "tes"], "did you mean 'test'?"),
        (["-O", "n=0"], "n: 0: must be"),
        (["--temperature", "-1"], "temperature: -1.0: must be"),
        (["--block-size", "0"], "block_size: 0: must be"),
        (["-O", "max_tokens=0"], "max_tokens: 0: must be"),
    ],
)
def test_bad_options_exit_with_2_and_say_the_mend(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "abc", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_chat_template_wraps_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(FakeTokenizer, "chat_template", "{{ messages }}", raising=False)
    assert folo(monkeypatch, "abc", "--chat", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"]["text"] == "user: abc / "


def test_listing_it_imports_no_torch_and_the_package_neither() -> None:
    code = (
        "import sys, folo_trace, folo_trace.plugin, folo_trace.command\n"
        "folo_trace.Recorder, folo_trace.build_trace, folo_trace.render\n"
        "print('torch' in sys.modules, [spec.name for spec in folo_trace.plugin.folo_commands()])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False ['trace']"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import folo_trace

    with pytest.raises(AttributeError, match="no attribute 'Recoder'"):
        _: Any = folo_trace.Recoder
