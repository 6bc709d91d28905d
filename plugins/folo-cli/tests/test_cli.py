"""The command line: fast help, streaming, JSON lines, exit codes, and a conversation."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from engines import TemplateTokenizer, make_llm
from folo_cli import chat as chat_module
from folo_cli import options
from folo_core.cli import main as main_module
from folo_core.testing.fakes import FakeModel

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """Stand a fake model in for any that the command line names."""
    model = FakeModel()
    opened = []

    def open_model(name: str, **chosen: Any) -> Any:
        opened.append((name, chosen))
        return make_llm(model, tokenizer=TemplateTokenizer())

    monkeypatch.setattr(options, "open_model", open_model)
    model.opened = opened  # type: ignore[attr-defined]
    return model


def folo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``folo`` in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["folo", *arguments])
    try:
        main_module.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return 0


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_folo_core_imports_no_torch() -> None:
    code = "import sys, folo_core; folo_core.SamplingParams; folo_core.EngineConfig; print('torch' in sys.modules)"
    assert run_python(code) == "False"


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["--version"], ["config", "show", "--help"]])
def test_help_and_listings_import_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['folo', *{arguments!r}]\n"
        "from folo_core.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('torch imported:', 'torch' in sys.modules, 'transformers imported:', 'transformers' in sys.modules)"
    )
    assert run_python(code).endswith("torch imported: False transformers imported: False")


def test_help_lists_every_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert folo(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("generate", "chat", "bench", "plugins", "config"))


@pytest.mark.parametrize("name", ["generate", "chat", "bench", "plugins", "config"])
def test_every_subcommand_has_help_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, name, "--help") == 0
    assert "--help" in capsys.readouterr().out


def test_an_unknown_subcommand_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert folo(monkeypatch, "generat") == 2
    assert "generat" in capsys.readouterr().err


def test_one_prompt_streams_as_text(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "hello", "--max-tokens", "6", "--model", "x", "--quantization", "int4") == 0
    captured = capsys.readouterr()
    tokenizer = TemplateTokenizer()
    tokens = model.expected_tokens(tokenizer.encode("hello"), 6)
    assert captured.out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert "tokens/s" in captured.err
    options = {"dtype": "auto", "quantization": "int4", "kv_cache_dtype": "auto", "max_model_len": None}
    assert model.opened == [("x", options)]  # type: ignore[attr-defined]


def test_several_prompts_give_a_json_line_each(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "hello", "you", "--max-tokens", "4", "--no-stats") == 0
    captured = capsys.readouterr()
    lines = sorted(map(json.loads, captured.out.splitlines()), key=lambda line: line["index"])
    assert [line["prompt"] for line in lines] == ["hello", "you"]
    assert all(line["outputs"][0]["finish_reason"] in ("length", "stop") for line in lines)
    assert captured.err == ""


def test_a_strategy_is_chosen_by_name_and_its_fields_are_set(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "hello", "--strategy", "random", "-O", "seed=3", "-O", "max_tokens=4") == 0
    drawn = capsys.readouterr().out
    tokenizer = TemplateTokenizer()
    expected = tokenizer.decode(model.expected_tokens(tokenizer.encode("hello"), 4), skip_special_tokens=True)
    assert 1 <= len(drawn.rstrip("\n")) <= 4
    assert drawn.rstrip("\n") != expected, "a draw at temperature 1 is not the greedy answer"
    assert folo(monkeypatch, "generate", "hello", "--strategy", "greedy", "-O", "max_tokens=4") == 0
    assert capsys.readouterr().out == expected + "\n"
    assert folo(monkeypatch, "generate", "hello", "-O", "max_token=4") == 2
    assert "did you mean 'max_tokens'?" in capsys.readouterr().err


def test_prompts_come_from_a_file_and_answers_go_to_one(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("one\n\ntwo\n")
    assert folo(monkeypatch, "generate", "-f", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--chat") == 0
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {"user: one / assistant: ", "user: two / assistant: "}


def test_a_prompt_comes_through_a_pipe(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert folo(monkeypatch, "generate", "--json", "--max-tokens", "2") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "hello"


def test_bad_input_exits_with_2_and_says_the_mend(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "x", "--temperature", "-1") == 2
    assert "temperature: -1.0: must be" in capsys.readouterr().err
    assert folo(monkeypatch, "generate", "") == 2
    assert "prompt: it has no tokens" in capsys.readouterr().err
    assert folo(monkeypatch, "-p", "yes:x", "plugins", "list") == 2
    assert "no:NAME" in capsys.readouterr().err


def test_a_model_that_is_not_there_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "x", "--model", "./nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


def test_plugins_can_be_left_out_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FOLO_BLOCK", "")
    assert folo(monkeypatch, "-p", "no:folo-sampling", "plugins", "list", "--json") == 0
    rows = {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert rows["folo-sampling"] == "blocked"


def test_ctrl_c_keeps_what_was_written_and_exits_with_130(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupt(_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    model.before_forward = interrupt
    tokenizer = TemplateTokenizer()
    prompt = next(c for c in "abcdefghijklmnop" if len(model.expected_tokens(tokenizer.encode(c), 8)) == 8)
    assert folo(monkeypatch, "generate", prompt, "--max-tokens", "20") == 130
    captured = capsys.readouterr()
    assert captured.out == tokenizer.decode(model.expected_tokens(tokenizer.encode(prompt), 4)) + "\n"
    assert "interrupted" in captured.err


def test_ctrl_c_keeps_the_lines_that_were_finished(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first prompt ends at once, the second never does."""
    steps = []

    def interrupt(_: Any) -> None:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt

    def end_the_first(logits: Any, pasts: list[list[int]]) -> Any:
        for row, past in enumerate(pasts):
            logits[row, 63] = 1e3 if past[0] == 1 else -1e3
        return logits

    model.before_forward, model.edit_logits = interrupt, end_the_first
    out = tmp_path / "out"
    assert folo(monkeypatch, "generate", chr(33), "b", "--max-tokens", "50", "-o", str(out)) == 130
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["index"], line["outputs"][0]["finish_reason"]) == (0, "stop")


def test_a_full_disk_exits_with_1_and_says_so(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folo(monkeypatch, "generate", "a", "b", "-o", "/dev/full") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_disk_that_fills_up_keeps_the_lines_that_were_written(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: the write that passes it fails."""
    out = tmp_path / "out"
    assert folo(monkeypatch, "generate", "a", "b", "c", "--max-tokens", "4", "-o", str(out)) == 0
    whole = out.read_bytes()
    room = whole.index(b"\n") + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status = folo(monkeypatch, "generate", "a", "b", "c", "--max-tokens", "4", "-o", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert "what was written before is kept" in capsys.readouterr().err
    kept = out.read_bytes()
    assert kept == whole[: len(kept)]
    assert len(kept) >= whole.index(b"\n") + 1
    assert json.loads(kept.splitlines()[0])["outputs"][0]["finish_reason"] in {"stop", "length"}


BROKEN_PIPE = """
import sys
from engines import TemplateTokenizer, make_llm
from folo_cli import options
from folo_core.cli.main import main
from folo_core.testing.fakes import FakeModel

model, steps = FakeModel(), []

def wait(_):
    steps.append(1)
    if len(steps) == 12:
        sys.stdin.read()  # until the reader has gone

def end_the_first(logits, pasts):
    for row, past in enumerate(pasts):
        logits[row, 63] = 1e3 if past[0] == 1 else -1e3
    return logits

model.before_forward, model.edit_logits = wait, end_the_first
options.open_model = lambda *_, **__: make_llm(model, tokenizer=TemplateTokenizer())
sys.argv = ["folo", "generate", chr(33), "b", "c", "--max-tokens", "20"]
main()
"""


def test_a_broken_pipe_exits_with_141_and_what_was_read_is_whole() -> None:
    """The first prompt ends at once; its reader leaves before the others do."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", BROKEN_PIPE]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        line = json.loads(process.stdout.readline())
        process.stdout.close()
        process.stdin.close()
        complaint = process.stderr.read()
        assert process.wait(60) == 141
    assert (line["index"], line["outputs"][0]["finish_reason"]) == (0, "stop")
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint


class Script:
    """Lines typed at the prompt; an exception among them is raised instead."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    def __call__(self, prompt: str = "") -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def talk(monkeypatch: pytest.MonkeyPatch, *lines: Any) -> list[Any]:
    """Run ``folo chat`` over scripted input and return the conversations it had."""
    conversations = []

    class Kept(chat_module.Conversation):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            conversations.append(self)

    monkeypatch.setattr(chat_module, "Conversation", Kept)
    monkeypatch.setattr("builtins.input", Script(*lines))
    options = ["--max-tokens", "6", "--temperature", "0", "--system", "be brief", "--quantization", "int8"]
    assert folo(monkeypatch, "chat", *options) == 0
    return conversations


def test_chat_keeps_the_history(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (conversation,) = talk(monkeypatch, "hello", "", "again\\", "and again", "/quit")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] == "again\nand again"
    assert conversation._prompt()["prompt"].startswith("system: be brief / user: hello / assistant: ")


def test_ctrl_c_stops_the_answer_and_not_the_program(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupt(_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model.before_forward = interrupt
    (conversation,) = talk(monkeypatch, "hello", KeyboardInterrupt, "more")
    assert len(conversation.messages) == 4
    assert len(conversation.messages[1]["content"]) == 2
    shown = capsys.readouterr().out
    assert "stopped" in shown
    assert "Ctrl-D" in shown


def test_chat_commands(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    (conversation,) = talk(
        monkeypatch,
        "/help",
        "/retry",
        "hello",
        "/retry",
        f"/save {file}",
        "/save /nowhere/x",
        "/system be long",
        "boom",
        "/clear",
    )
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert conversation.system == "be long"
    assert conversation.messages == []
    shown = capsys.readouterr().out
    assert "/retry: nothing has been asked yet" in shown
    assert "No such file" in shown
    assert "roles must alternate" in shown
    assert "Ctrl-C stops an answer" in shown
    assert "\033[" not in shown, "colour only for a terminal"


def test_chat_forgets_the_oldest_turns_when_the_window_is_full(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (conversation,) = talk(monkeypatch, *["word " * 9] * 8)
    assert "no longer fit" in capsys.readouterr().out
    assert 2 <= len(conversation.messages) < 16
    assert conversation.messages[0]["role"] == "user"


def test_a_contested_subcommand_goes_by_its_qualified_name_and_the_others_work(site: Any) -> None:
    """A plugin that offers a second ``chat`` must not take ``folo plugins doctor`` away."""
    site.install(
        "folo-rival",
        """
        from folo_core.plugins import hookimpl
        from folo_core.plugins.specs import CommandSpec

        @hookimpl
        def folo_commands():
            return [CommandSpec(name="chat", help="Another chat.", factory=dict)]
        """,
    )
    run = "import sys; from folo_core.cli.main import main; sys.argv = ['folo', *{!r}]; main()"
    listing = site.run(run.format(["--help"]))
    assert "folo-rival:chat" in listing.stdout
    assert "folo-cli:chat" in listing.stdout
    assert listing.stderr == ""
    doctor = site.run(run.format(["plugins", "doctor"]))
    assert doctor.returncode == 1
    assert "folo-rival:chat" in doctor.stdout + doctor.stderr
