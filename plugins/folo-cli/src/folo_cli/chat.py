"""``folo chat``: a conversation in the terminal. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from folo_cli import options
from folo_core.errors import FoloError, RequestError

if TYPE_CHECKING:
    from folo_core.llm import LLM
    from folo_core.sampling_params import SamplingParams

app = typer.Typer()

HELP = """\
/help          this list
/clear         forget the conversation
/system TEXT   set the system message and start over
/retry         answer the last question again
/save FILE     write the conversation as JSON
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer. End a line with \\ to go on in the next one."""


@app.command()
def chat(
    model: options.Model = "demo",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    max_model_len: options.MaxModelLen = None,
) -> None:
    """Talk with a model. Type /help inside."""
    params = options.sampling_params(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    llm = options.open_model(
        model,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
    )
    talk = Conversation(llm, params, system)
    _enable_line_editing()
    print(_style(f"{model} is ready. /help lists commands, Ctrl-D leaves.", "2"))  # noqa: T201 (the terminal is the product)
    while (line := _read()) is not None:
        if line.strip():
            _handle(talk, line)


@attrs.define
class Conversation:
    """The messages so far, and how to answer the last one."""

    llm: LLM
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, str]] = attrs.field(factory=list)

    def ask(self, text: str) -> None:
        """Add a question and stream its answer."""
        self.messages.append({"role": "user", "content": text})
        self.answer()

    def answer(self) -> None:
        """Answer the last question on stdout; Ctrl-C keeps what has been said."""
        pieces: list[str] = []
        started, tokens, stopped = time.perf_counter(), 0, False
        try:
            for out in self.llm.stream(self._prompt(), self.params):
                if out.error is not None:
                    raise out.error
                tokens += len(out.outputs[0].token_ids)
                pieces.append(out.outputs[0].text)
                sys.stdout.write(out.outputs[0].text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stopped = True
        seconds = time.perf_counter() - started
        rate = f"{tokens} tokens, {tokens / seconds:.1f}/s{', stopped' if stopped else ''}"
        sys.stdout.write(f"\n{_style(rate, '2')}\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> dict[str, object]:
        """Lay out as much of the conversation as fits, forgetting the oldest turns first."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        limit = self.llm.engine.inputs.max_model_len - min(self.params.max_tokens or 1, 64)
        turns = self.messages
        while True:
            prompt = self.llm.apply_chat_template([*head, *turns])
            ids = prompt["prompt_token_ids"]
            if not isinstance(ids, list) or len(ids) <= limit or len(turns) <= 1:
                break
            turns = turns[2:] if len(turns) > 2 else turns[1:]  # noqa: PLR2004 (a question and its answer)
        if len(turns) < len(self.messages):
            print(_style(f"(the oldest {len(self.messages) - len(turns)} messages no longer fit)", "2"))  # noqa: T201
            self.messages = turns
        return prompt

    def retry(self) -> None:
        """Drop the last answer and give another."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            message = "/retry: nothing has been asked yet"
            raise RequestError(message)
        self.answer()


def _handle(talk: Conversation, line: str) -> None:
    """Run a command or ask a question; an error is told and the conversation goes on."""
    name, _, rest = line.strip().partition(" ")
    asked = len(talk.messages)
    try:
        if not name.startswith("/"):
            talk.ask(line)
        elif name in ("/quit", "/exit"):
            raise typer.Exit
        elif name == "/clear":
            talk.messages.clear()
        elif name == "/system":
            talk.system = rest or None
            talk.messages.clear()
        elif name == "/retry":
            talk.retry()
        elif name == "/save":
            Path(rest).expanduser().write_text(
                json.dumps(talk.messages, indent=2, ensure_ascii=False), encoding="utf-8"
            )
        else:
            print(HELP)  # noqa: T201
    except (FoloError, OSError) as error:
        del talk.messages[asked:]
        print(_style(f"{error}", "31"))  # noqa: T201


def _read() -> str | None:
    """Read a question, several lines if they end with a backslash; None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = input(_style("> " if not lines else ". ", "1;36", for_readline=True))
        except EOFError:
            print()  # noqa: T201
            return None
        except KeyboardInterrupt:
            print(_style("\n(Ctrl-D or /quit leaves)", "2"))  # noqa: T201
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _style(text: str, code: str, *, for_readline: bool = False) -> str:
    """Colour text if stdout is a terminal; readline must be told which characters take no room."""
    if not sys.stdout.isatty():
        return text if not for_readline else ""
    start, end = f"\033[{code}m", "\033[0m"
    if for_readline:
        start, end = f"\001{start}\002", f"\001{end}\002"
    return f"{start}{text}{end}"


def _enable_line_editing() -> None:
    """History and cursor keys at the prompt, where the platform has readline."""
    try:
        import readline  # noqa: F401 (importing it is what enables it)
    except ImportError:
        return
