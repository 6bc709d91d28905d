"""``folo top`` tells what the engine knows: its figures are the engine's own, on a terminal, in lines and in JSON."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from folo_trace_cases import PRESSURE, folo, interrupt_after, stand_in
from rich.console import Console

from engines import SamplerPlugin, TreeParams, TreeSampler, greedy, make_llm
from folo_core.async_engine import AsyncEngine
from folo_core.errors import ConfigError, RequestError
from folo_core.testing.fakes import FakeModel, fake_components
from folo_trace import Top
from folo_trace.view import view
from folo_trace.workload import Workload, parse_range

OPTIONS = {"num_blocks": 24, "swap_space": "256B", "preemption": "swap", "max_num_seqs": 8}
PROMPTS = ["abcdefgh" + "ij" * i for i in range(12)]


def text_of(renderable: Any, width: int = 110) -> str:
    console = Console(width=width, height=40, file=io.StringIO())
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


class Books:
    """Compares a top's figures with the engine's after every step."""

    def __init__(self, top: Top, **options: Any) -> None:
        self.top, self.seen = top, Counter()
        self.llm = make_llm(FakeModel(), plugins=[top], **(OPTIONS | options))

    def run(self, prompts: Any = PROMPTS, *, params: Any = None, tenants: Any = ("",)) -> None:
        engine = self.llm.engine
        params = greedy(max_tokens=16, ignore_eos=True) if params is None else params
        for i, prompt in enumerate(prompts):
            engine.add_request(f"r{i}", prompt, params, tenant=tenants[i % len(tenants)])
        while engine.has_unfinished_requests:
            engine.step()
            self.compare()

    def compare(self) -> None:
        stats, figures = self.llm.stats(), self.top.figures()
        for name in ("num_steps", "num_running", "num_waiting", "num_swapped", "num_preemptions", "num_swaps"):
            assert figures[name] == getattr(stats, name), name
            self.seen[name] += figures[name] > 0
        kv, cache = stats.kv, stats.prefix_cache
        assert figures["blocks"] == {
            "used": kv.num_used_blocks,
            "cached": kv.num_cached_blocks,
            "free": kv.num_free_blocks,
            "total": kv.num_blocks,
        }
        assert figures["block_bytes"] == kv.block_bytes > 0
        host = {"used": kv.num_host_blocks - kv.num_free_host_blocks, "total": kv.num_host_blocks}
        assert figures["host_blocks"] == host
        assert figures["prefix_cache"]["hit_tokens"] == cache.num_hit_tokens
        assert figures["prefix_cache"]["queried_tokens"] == cache.num_queried_tokens
        self.seen["hits"] += cache.num_hit_tokens > 0
        self.compare_requests(figures)

    def compare_requests(self, figures: dict[str, Any]) -> None:
        requests, rows = self.llm.engine.requests, {row["id"]: row for row in figures["requests"]}
        running = {request.request_id for request in self.llm.engine.state.running}
        assert {name for name, row in rows.items() if row["state"] == "running"} == running
        for name, row in rows.items():
            request = requests[name]
            lengths = [len(s.data.output_token_ids) for s in request.live]
            told = (row["tenant"], row["prompt_tokens"], row["output_tokens"], row["preemptions"], row["swaps"])
            counts = (request.metrics.num_preemptions, request.metrics.num_swaps)
            assert told == (request.tenant, len(request.prompt_token_ids), max(lengths), *counts)


def test_figures_are_the_engines_after_every_step() -> None:
    books = Books(Top("json", interval=1e9), enable_prefix_caching=True)
    books.run(tenants=("us", "them"))
    assert books.seen["num_swapped"] > 0, "somebody lay on the host"
    assert books.top.figures()["num_preemptions"] > books.top.figures()["num_swaps"] > 0
    assert books.seen["hits"] > 0, "something was found in the cache"
    summary = books.top.summary()
    assert summary["finished"] == {"length": len(PROMPTS)}
    assert summary["decode_tokens"] == 16 * len(PROMPTS)
    assert summary["prefill_tokens"] > sum(map(len, PROMPTS)) - summary["prefix_cache"]["hit_tokens"]
    assert 0 < summary["peak_blocks"] <= 24
    assert summary["swapped_out_blocks"] == summary["swapped_in_blocks"] > 0


def test_prefill_counts_prompts_and_decode_counts_what_is_generated() -> None:
    books = Books(Top("json", interval=1e9), num_blocks=256, long_prefill_token_threshold=5)
    books.run()
    summary = books.top.summary()
    assert summary["prefill_tokens"] == sum(map(len, PROMPTS))
    assert summary["decode_tokens"] == 16 * len(PROMPTS)
    assert summary["num_preemptions"] == 0


def test_figures_of_a_strategy_that_forks() -> None:
    top = Top("json", interval=1e9)
    llm = make_llm(FakeModel(), plugins=[top, SamplerPlugin(TreeSampler())], **(OPTIONS | {"max_num_seqs": 24}))
    llm.generate(PROMPTS, TreeParams(width=3, max_tokens=8, ignore_eos=True), use_tqdm=False)
    assert top.figures()["num_preemptions"] == llm.stats().num_preemptions > 0
    assert top.figures()["requests"] == []


def test_rates_are_of_the_last_seconds() -> None:
    top = Top("json", interval=1e9)
    llm = make_llm(FakeModel(), plugins=[top])
    assert top.figures()["per_second"] == {"steps": 0.0, "prefill_tokens": 0.0, "decode_tokens": 0.0}
    started = time.perf_counter()
    llm.generate("abcdefgh", greedy(max_tokens=4, ignore_eos=True), use_tqdm=False)
    least = 1 / (time.perf_counter() - started)
    rates = top.figures()["per_second"]
    assert rates["steps"] >= 4 * least
    assert rates["prefill_tokens"] >= 8 * least
    assert rates["decode_tokens"] == pytest.approx(rates["steps"], rel=0.01), "each step sampled one token"


def test_the_view_shows_the_figures() -> None:
    top = Top("json", interval=1e9, title="folo top · fake", console=Console(width=110, file=io.StringIO()))
    books = Books(top, enable_prefix_caching=True)
    views = []
    on_step = top.on_step
    top.on_step = lambda record: (on_step(record), views.append((top.figures(), text_of(top))))  # type: ignore[method-assign]
    books.run(tenants=("us", "them"))
    figures, text = next((f, t) for f, t in views if f["num_swapped"] and f["num_running"] > 1 and f["num_preemptions"])
    assert "folo top · fake" in text
    assert f"step {figures['num_steps']}" in text
    words = [f"{figures['num_running']} running", f"{figures['num_swapped']} swapped"]
    words.append(f"{figures['num_waiting'] - figures['num_swapped']} waiting")
    blocks = figures["blocks"]
    words.append(f"{blocks['used']} used, {blocks['cached']} cached, {blocks['free']} free of 24")
    words.append(f"({blocks['used'] * 32} of 768 B)")
    assert all(word in text for word in [*words, "of 8 (", "swaps: ", "blocks out"])
    assert f"{100 * figures['prefix_cache']['hit_rate']:.1f} % of" in text
    for row in figures["requests"]:
        (line,) = [line for line in text.splitlines() if line.startswith(row["id"] + " ")]
        cells = [str(row[name]) for name in ("tenant", "prompt_tokens", "output_tokens", "preemptions", "state")]
        assert line.split()[1:] == " ".join(cells).split()
    bars = [line.split()[1] for line in text.splitlines() if line.startswith("blocks")]
    assert len(bars[0]) == 36
    assert set(bars[0]) <= set("█▒░")


def test_a_low_terminal_shows_as_many_requests_as_fit() -> None:
    figures = Top("json").figures()
    row = {"tenant": "", "state": "running", "prompt_tokens": 1, "output_tokens": 2, "preemptions": 0, "swaps": 0}
    figures["requests"] = [{"id": f"r{i}", **row} for i in range(50)]
    for height in (24, 40):
        text = text_of(view(figures, "folo top", (110, height)))
        assert len(text.splitlines()) <= height
        assert (
            f"… and {50 - sum(line.startswith('r') and line[1].isdigit() for line in text.splitlines())} more" in text
        )


def test_a_narrow_terminal_loses_no_figure() -> None:
    top = Top("json", interval=1e9)
    Books(top, enable_prefix_caching=True).run()
    figures = top.figures() | {"block_bytes": 2**20}
    figures["blocks"] = {"used": 38, "cached": 2, "free": 460, "total": 500}
    for width in (80, 100, 200):
        text = text_of(view(figures, "folo top", (width, 24)), width)
        (line,) = [line for line in text.splitlines() if line.startswith("blocks")]
        assert line.rstrip().endswith("38 used, 2 cached, 460 free of 500 (38 of 500 MiB)")
        assert all(part in line for part in "█▒░"), "whatever is not nothing is seen"


def test_an_id_is_no_markup() -> None:
    figures = Top("json").figures()
    row = {"tenant": "[red]", "state": "running", "prompt_tokens": 1, "output_tokens": 2, "preemptions": 0, "swaps": 0}
    text = text_of(view(figures | {"requests": [{"id": "[bold]x[/]", **row}]}, "folo top", (110, 40)))
    assert "[bold]x[/]" in text
    assert "[red]" in text


def live_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=30, color_system="standard", _environ={})


def test_on_a_terminal_the_view_renews_itself_and_leaves_no_trace() -> None:
    top = Top(console=live_console(), interval=0.0)
    with top:
        make_llm(FakeModel(), plugins=[top]).generate(PROMPTS[:2], greedy(ignore_eos=True), use_tqdm=False)
    text = top.console.file.getvalue()
    assert text.count("folo top") >= 8, "once a step"
    assert "\x1b[?25l" in text, "the cursor was hidden"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and shown again"
    assert "16 tokens" in text[text.rindex("\x1b[?25h") :], "the summary comes last"


def test_the_terminal_is_restored_whatever_is_raised() -> None:
    top = Top(console=live_console())
    with pytest.raises(KeyboardInterrupt), top:
        raise KeyboardInterrupt
    text = top.console.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_elsewhere_there_are_plain_lines() -> None:
    top = Top(console=Console(file=io.StringIO(), width=60), interval=0.0)
    with top:
        books = Books(top)
        books.run()
    text = top.console.file.getvalue()
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if "  step " in line]
    assert len(lines) == books.llm.stats().num_steps
    assert any(" 1 swapped" in line or " 2 swapped" in line for line in lines)
    assert lines[-1].split("  ")[1] == f"step {len(lines)}"
    assert text.splitlines()[len(lines)].startswith("time: "), "the summary comes last"


def test_nothing_ran_nothing_is_summed_up() -> None:
    with Top(console=Console(file=io.StringIO())) as top:
        pass
    assert top.console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "loud"}, "mode: 'loud': must be live, lines or json"),
        ({"interval": -1.0}, "interval: -1.0: must be a number of seconds"),
        ({"interval": float("nan")}, "interval: nan: must be"),
    ],
)
def test_bad_arguments_say_the_mend(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Top(**arguments)


def test_the_command_writes_json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, FakeModel())
    work = ["--requests", "14", "--prompt-tokens", "4-12", "--output-tokens", "12-20", "--shared-tokens", "9"]
    more = ["--tenants", "2", "--policy", "fair", "--enable-prefix-caching", "--interval", "0"]
    assert folo(monkeypatch, "top", "--json", *work, *more, *PRESSURE) == 0
    *samples, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {sample["kind"] for sample in samples} == {"sample"}
    assert [sample["num_steps"] for sample in samples] == list(range(1, len(samples) + 1))
    assert summary["kind"] == "summary"
    assert summary["complete"] is True
    assert summary["finished"] == {"length": 14}
    assert summary["num_preemptions"] >= summary["num_swaps"] > 0
    assert summary["prefix_cache"]["hit_tokens"] > 0
    assert {row["tenant"] for sample in samples for row in sample["requests"]} == {"tenant-0", "tenant-1"}


def test_the_command_takes_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, FakeModel())
    (tmp_path / "prompts.txt").write_text("abc\n\nde\n", encoding="utf-8")
    given = ["xyz", "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "3", "-O", "ignore_eos=true"]
    assert folo(monkeypatch, "top", *given) == 0
    text = capsys.readouterr().out
    assert "3 finished (3 length)" in text
    assert "8 tokens" in text
    assert "9 tokens" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-tokens", "many"], "--prompt-tokens: 'many': write a length such as 64"),
        (["--output-tokens", "9-3"], "--output-tokens: '9-3': write a length such as 64"),
        (["--file", "/dev/null"], "--file: '/dev/null': holds no prompt"),
        (["--requests", "0"], "--requests"),
        (["--num-blocks", "0"], "num_blocks: 0: must be"),
        (["--policy", "fairest"], "did you mean 'fair'?"),
    ],
)
def test_bad_options_exit_with_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, FakeModel())
    assert folo(monkeypatch, "top", *arguments) == 2
    assert words in capsys.readouterr().err


def test_ctrl_c_aborts_and_sums_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel()
    stand_in(monkeypatch, model)
    interrupt_after(model, 5)
    assert folo(monkeypatch, "top", "--json", "--requests", "4") == 130
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["kind"] == "summary"
    assert summary["complete"] is False
    assert summary["finished"] == {"abort": 4}
    assert summary["blocks"]["total"] == 256
    assert captured.err == "folo: interrupted\n"


class Gone(io.StringIO):
    """A reader that has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def test_a_reader_that_leaves_ends_the_run() -> None:
    top = Top("json", interval=0.0, console=Console(file=Gone()))
    model = FakeModel()
    llm = make_llm(model, plugins=[top])
    work = Workload.draw(3, (4, 4), (2, 100), vocab_size=60, seed=1)
    from folo_trace.top_command import watch

    with pytest.raises(BrokenPipeError):
        watch(llm, top, work)
    assert not llm.engine.has_unfinished_requests
    assert top.gauges.finished["abort"] > 0, "the others did not run to their ends in vain"


def test_a_workload_is_what_was_asked_for() -> None:
    work = Workload.draw(40, (3, 6), (2, 5), vocab_size=50, seed=3, num_shared=7, num_tenants=3)
    assert work == Workload.draw(40, (3, 6), (2, 5), vocab_size=50, seed=3, num_shared=7, num_tenants=3)
    assert work.prompts != Workload.draw(40, (3, 6), (2, 5), vocab_size=50, seed=4, num_shared=7).prompts
    tokens = [prompt["prompt_token_ids"] for prompt in work.prompts]
    assert {tuple(ids[:7]) for ids in tokens} == {tuple(tokens[0][:7])}
    assert {len(ids) for ids in tokens} == {10, 11, 12, 13}
    assert {params.max_tokens for params in work.params} == {2, 3, 4, 5}
    assert Counter(work.tenants) == {"tenant-0": 14, "tenant-1": 13, "tenant-2": 13}
    assert all(0 <= token < 50 for ids in tokens for token in ids)


def test_ranges() -> None:
    assert parse_range("--x", "64") == (64, 64)
    assert parse_range("--x", "16-256") == (16, 256)
    for text in ("", "0", "-3", "3-", "5-4", "a-b", "1-2-3"):
        with pytest.raises(RequestError, match="write a length"):
            parse_range("--x", text)


def test_watching_changes_no_token() -> None:
    params = greedy(max_tokens=16, ignore_eos=True)
    plain = make_llm(FakeModel(), **OPTIONS)
    expected = [o.outputs[0].token_ids for o in plain.generate(PROMPTS, params, use_tqdm=False)]
    assert plain.stats().num_swaps > 0
    top = Top("lines", console=Console(file=io.StringIO()), interval=0.0)
    with top:
        outputs = make_llm(FakeModel(), plugins=[top], **OPTIONS).generate(PROMPTS, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected


def test_stdout_decides_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Top().mode.value == "lines"
    assert Top(console=live_console()).mode.value == "live"
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert Top(console=dumb).mode.value == "lines"


def test_an_engine_on_a_thread_of_its_own() -> None:
    async def serve() -> list[Any]:
        async with AsyncEngine(fake_components(plugins=[top])) as engine:
            streams = [engine.generate("abc" + x, greedy(ignore_eos=True), f"r{x}") for x in "defg"]
            return [[output async for output in stream][-1] for stream in streams]

    top = Top(console=live_console(), interval=0.0)
    with top:
        outputs = asyncio.run(serve())
    assert all(output.finished for output in outputs)
    assert top.summary()["finished"] == {"length": 4}
    assert top.console.file.getvalue().count("folo top") > top.summary()["num_steps"]
