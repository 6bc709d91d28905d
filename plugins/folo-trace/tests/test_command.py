"""``folo trace`` from end to end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folo_trace_cases import PRESSURE, folo, interrupt_after, stand_in

from engines import SamplerPlugin, TreeParams, TreeSampler
from folo_core.testing.fakes import FakeModel, FakeTokenizer
from folo_trace.command import Format, Target


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fake model and a test strategy stand among the installed plugins."""
    stand_in(monkeypatch, FakeModel(), SamplerPlugin(TreeSampler(), TreeParams))


def test_it_writes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "tree.html"
    assert (
        folo(monkeypatch, "trace", "abc", "--strategy", "test", "-O", "width=3", "--max-tokens", "6", "-o", str(page))
        == 0
    )
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert '"strategy":"test-sampler:test"' in text
    assert '"params":{"max_tokens":6,"width":3}' in text
    assert '"model":"fake"' in text
    assert "tokens sampled and" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--json", "-o", "x.data"], ["--json", "-o", "x.json"], ["--format", "tree", "-o", "x.json"]]
)
def test_it_writes_a_trees_data(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert folo(monkeypatch, "trace", "abc", "--block-size", "2", *arguments) == 0
    run = json.loads((tmp_path / arguments[-1]).read_text(encoding="utf-8"))
    assert run["block_size"] == 2
    assert run["strategy"] == "folo-sampling:greedy"


def test_it_prints_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert folo(monkeypatch, "trace", "-", "--json", "--temperature", "0.7", "--seed", "5") == 0
    run = json.loads(capsys.readouterr().out)
    assert run["prompt"]["text"] == "from a pipe"
    assert run["params"] == {"temperature": 0.7, "seed": 5, "max_tokens": 24}
    assert run["strategy"] == "folo-sampling:random"


def test_the_page_is_trace_html_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert folo(monkeypatch, "trace", "abc") == 0
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
        (["--kv-cache-dtype", "int8"], "kv_cache_dtype: 'int8': must be one of auto, fp8"),
        (["--kv-cache-dtype", "fp8"], "cache.kv_cache_dtype: 'fp8': the loader of model 'fake'"),
        (["--quantization", "int5"], "quantization: 'int5': must be one of int8, int4, fp8 or None"),
        (["--quantization", "int4"], "model.quantization: 'int4': the loader of model 'fake'"),
        (["--kv-cache-bytes", "much"], "kv_cache_bytes: 'much': must be a size"),
        (["--preemption", "never"], "preemption: 'never': must be"),
        (["--preemption", "swap"], "set cache.swap_space"),
        (["another", "-o", "tree.html"], "prompts: 2 given: a tree is of one"),
        (["another", "--json", "--format", "tree"], "prompts: 2 given: a tree is of one"),
        (["--format", "picture"], "'picture' is not one of"),
    ],
)
def test_bad_options_exit_with_2_and_say_the_mend(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "trace", "abc", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_chat_template_wraps_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(FakeTokenizer, "chat_template", "{{ messages }}", raising=False)
    assert folo(monkeypatch, "trace", "abc", "--chat", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"]["text"] == "user: abc / "


def test_listing_it_imports_no_torch_and_the_package_neither() -> None:
    code = (
        "import sys, folo_trace, folo_trace.plugin\n"
        "assert 'rich' not in sys.modules\n"
        "import folo_trace.command, folo_trace.top_command\n"
        "folo_trace.Recorder, folo_trace.Timeline, folo_trace.Top, folo_trace.build_trace, folo_trace.render\n"
        "print('torch' in sys.modules, [spec.name for spec in folo_trace.plugin.folo_commands()])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False ['trace', 'top']"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import folo_trace

    with pytest.raises(AttributeError, match="no attribute 'Recoder'"):
        _: Any = folo_trace.Recoder


def test_run_json_is_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert folo(monkeypatch, "trace", "abc", "--max-tokens", "5", "-O", "ignore_eos=true", "-o", str(file)) == 0
    run = json.loads(file.read_text(encoding="utf-8"))
    assert run["otherData"]["model"] == "fake"
    names = [event["name"] for event in run["traceEvents"] if event["ph"] == "X" and event["pid"] == 2]
    assert names == ["queued", "running", "prefill", *["decode"] * 4]
    assert "1 requests in 5 steps, 0 preemptions" in capsys.readouterr().err


def test_many_prompts_under_pressure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join("abcdefgh" + "ij" * i + "\n\n" for i in range(11)), encoding="utf-8")
    more = [
        "-O",
        "ignore_eos=true",
        "--enable-prefix-caching",
        "--policy",
        "priority",
        "--max-num-batched-tokens",
        "64",
    ]
    assert folo(monkeypatch, "trace", "last", "--file", "prompts.txt", *PRESSURE, *more) == 0
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    instants = [event["name"] for event in run["traceEvents"] if event["ph"] == "i" and event["pid"] == 2]
    swaps, others = instants.count("swapped out"), instants.count("preempted")
    assert swaps > 0
    assert instants.count("finished: length") == 12
    words = f"12 requests in .* steps, {swaps + others} preemptions, {swaps} of them swaps"
    assert re.search(words, capsys.readouterr().err)


def test_a_run_may_be_printed_and_chat_wraps_each_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTokenizer, "chat_template", "{{ messages }}", raising=False)
    assert folo(monkeypatch, "trace", "abc", "de", "--chat", "--json", "--format", "perfetto") == 0
    events = json.loads(capsys.readouterr().out)["traceEvents"]
    queued = [event["args"]["prompt_tokens"] for event in events if event["name"] == "queued"]
    assert queued == [len("user: abc / "), len("user: de / ")]


def test_a_request_that_fails_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        message = "boom"
        raise ValueError(message)

    model = FakeModel()
    model.before_forward = fail
    stand_in(monkeypatch, model)
    assert folo(monkeypatch, "trace", "abc", "-o", str(tmp_path / "run.json")) == 0
    assert "1 requests (1 failed)" in capsys.readouterr().err


def test_ctrl_c_keeps_the_run_so_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = FakeModel()
    stand_in(monkeypatch, model)
    interrupt_after(model, 3)
    assert folo(monkeypatch, "trace", "abc", "-O", "ignore_eos=true", "-o", str(tmp_path / "run.json")) == 130
    events = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["traceEvents"]
    assert "finished: abort" in {event["name"] for event in events}
    assert len([event for event in events if event["name"] == "decode" and event["pid"] == 2]) == 2


def test_no_prompt_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert folo(monkeypatch, "trace") == 2
    assert "prompts: none given" in capsys.readouterr().err


def test_a_file_that_is_no_text_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"ab\xff")
    assert folo(monkeypatch, "trace", "--file", str(tmp_path / "prompts.txt")) == 2
    assert "is not UTF-8 (invalid start byte at byte 2): give one prompt a line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "num_prompts", "wanted"),
    [
        ((None, None, False), 1, (Format.TREE, "trace.html", False)),
        ((None, None, True), 1, (Format.TREE, None, True)),
        ((None, "tree.html", False), 1, (Format.TREE, "tree.html", False)),
        ((None, "run.json", False), 1, (Format.PERFETTO, "run.json", True)),
        ((None, "run.json", True), 1, (Format.TREE, "run.json", True)),
        ((None, None, False), 2, (Format.PERFETTO, "run.json", False)),
        ((Format.PERFETTO, None, True), 2, (Format.PERFETTO, None, True)),
        ((Format.PERFETTO, "x.trace", False), 1, (Format.PERFETTO, "x.trace", False)),
    ],
)
def test_what_is_written_where(given: Any, num_prompts: int, wanted: Any) -> None:
    format_, output, as_json = given
    path = None if output is None else Path(output)
    target = Target.choose(format_, path, as_json=as_json, num_prompts=num_prompts)
    assert (target.format, None if target.path is None else str(target.path), target.data) == wanted
