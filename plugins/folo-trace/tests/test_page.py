"""The page: whole in itself, safe with any token, and alive in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from engines import SamplerPlugin, TreeParams, TreeSampler, greedy, make_llm
from folo_core.sampling.interface import SamplerOutput
from folo_core.testing.fakes import FakeTokenizer
from folo_trace.command import record
from folo_trace.page import embed, render
from folo_trace.recorder import Recorder

if TYPE_CHECKING:
    from pathlib import Path

BREAKOUT = "</script><script>document.documentElement.dataset.pwned=1</script>"
NASTY = [
    BREAKOUT,
    "<!--",
    "<img src=x onerror=alert(1)>",
    "{{script}}",
    "\u2028",
    "\n",
    "\t",
    " ",
    "'\"&amp;",
    "\u202e",
]
NASTY += ["", "😀", "\x00", "]]>", "\ufffd", "é"]

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


class NastyTokenizer(FakeTokenizer):
    """Tokens whose texts are markup."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(NASTY[token % len(NASTY)] for token in token_ids)


class Search(TreeSampler):
    """A best-first beam of stated log probabilities, small enough to stand here."""

    def step(self, logits: Any, metadata: Any) -> SamplerOutput:
        width = metadata.params[0].width
        log_probs = logits.log_softmax(-1)
        top = (log_probs + metadata.scores[:, None]).flatten().topk(width)
        order = (top.indices // log_probs.shape[1]).argsort(stable=True)
        parents, tokens = (top.indices // log_probs.shape[1])[order], (top.indices % log_probs.shape[1])[order]
        stated = log_probs[parents, tokens][:, None]
        return SamplerOutput(parents=parents, tokens=tokens[:, None], logprobs=stated, scores=top.values[order])


@cache
def trace(kind: str) -> str:
    """Return a trace as JSON: of greedy decoding, of a small search, of a large one, of no branch kept."""
    recorder, tokenizer = Recorder(), NastyTokenizer() if kind == "nasty" else None
    llm = make_llm(plugins=[recorder, SamplerPlugin(Search())], tokenizer=tokenizer, num_blocks=512)
    params = {
        "greedy": greedy(max_tokens=20),
        "small": TreeParams(width=4, max_tokens=12),
        "large": TreeParams(width=8, max_tokens=64, ignore_eos=True),
        "nasty": TreeParams(width=4, max_tokens=12),
        "one": greedy(max_tokens=1),
    }[kind]
    return json.dumps(record(llm, recorder, "The sea is <b>deep</b> & https", params))


KINDS = ["greedy", "small", "large", "nasty", "one"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_asks_the_network_for_nothing(kind: str) -> None:
    page = render(json.loads(trace(kind)))
    addresses = re.findall(r"\w+://[^\s\"'<>]*", page)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}, "the namespace of SVG is a name, not an address"
    assert not re.findall(
        r"(?i)<(?:link|iframe|object|embed|img|base)\b|@import|url\(|\bfetch\(|XMLHttpRequest|import\(", page
    )
    assert not re.findall(r"(?i)<script[^>]*\ssrc", page)
    assert "default-src 'none'" in page
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_come_back_from_the_page(kind: str) -> None:
    run = json.loads(trace(kind))
    page = render(run)
    (data,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == run


def test_no_token_breaks_out_of_the_script() -> None:
    run = json.loads(trace("nasty"))
    assert any("</script>" in node["text"] for node in run["nodes"]), "the case is there"
    page = render(run)
    assert page.count("</script>") == page.count("<script") == 2
    assert "<!--" not in page
    assert page.count("{{script}}") >= 1, "a mark in the data is data"


def test_embedded_json_has_no_character_that_html_or_script_reads() -> None:
    text = embed({"a": "<>&\u2028\u2029\udc80"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": "<>&\u2028\u2029\udc80"}
    text.encode()


def browse(tmp_path: Path, page: str, fragment: str = "", size: str = "1280,800") -> tuple[str, str]:
    """Open a page in a headless browser; return the document it made of it, and what it said."""
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    assert BROWSER is not None
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}",
               "--virtual-time-budget=12000", f"{file.as_uri()}#{fragment}"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, encoding="utf-8")
    return result.stdout, result.stderr


def console(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_draws_it_without_complaint(kind: str, tmp_path: Path) -> None:
    run = json.loads(trace(kind))
    document, said = browse(tmp_path, render(run))
    assert 'data-ready="1"' in document, said
    assert "data-error" not in document
    assert "data-pwned" not in document
    assert console(said) == []
    assert "<img" not in document
    boxes = len(re.findall(r'class="node\b', document))
    if kind == "large":
        assert 8 < boxes < 120 < len(run["nodes"]), "dead branches are folded, runs are one box"
        assert "folded here" in document
    elif kind == "nasty":
        assert "&lt;/script&gt;" in document
        assert "⏎" in document
        assert "⇥" in document
        assert "\\u202e" in document
    elif kind == "small":
        assert boxes == len(run["nodes"])
        assert document.count('<text class="cross"') == run["summary"]["pruned"] > 0


@needs_browser
def test_the_address_chooses_step_and_token(tmp_path: Path) -> None:
    run = json.loads(trace("small"))
    dead = next(node for node in run["nodes"] if node["status"] == "pruned" and node["depth"] > 2)
    fragment = f"step={dead['step']}&node={dead['id']}&theme=dark"
    document, said = browse(tmp_path, render(run), fragment, "500,1400")
    assert console(said) == []
    assert 'data-theme="dark"' in document
    assert f"step {dead['step']} of {len(run['steps'])}" in document
    assert f"died in step {dead['died']}" in document
    on = re.findall(r'class="node[^"]*\bon\b', document)
    assert len(on) == dead["depth"], "its path is lit"
    assert re.search(r'class="node[^"]*\bfuture\b', document), "what came later is faint"
    rows = next(step for step in run["steps"] if step["step"] == dead["step"])["rows"]
    assert len(re.findall(r'<th scope="row"', document)) == len(rows)
    assert len(re.findall(r'<tr class="lit"', document)) == 1


@needs_browser
@pytest.mark.parametrize("fragment", ["step=99999&node=99999", "step=-1&node=x", "step=0", "%E0%A4%A"])
def test_a_strange_address_does_no_harm(fragment: str, tmp_path: Path) -> None:
    document, said = browse(tmp_path, render(json.loads(trace("small"))), fragment)
    assert 'data-ready="1"' in document
    assert console(said) == []


ACTIONS = """
<script>
addEventListener("load", () => {
  const seen = [], note = () => seen.push([state.step, state.node, document.querySelectorAll("#tree .node").length]);
  const click = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  note();
  click(byId("fold")); note();
  click(document.querySelector("#tree .more")); note();
  press(byId("tree"), "ArrowRight"); note();
  press(byId("tree"), "ArrowRight"); note();
  press(document.activeElement, "Escape"); note();
  byId("step").value = 2; byId("step").dispatchEvent(new Event("input")); note();
  document.querySelector("#tree .node").dispatchEvent(new Event("pointerenter"));
  [...document.querySelectorAll("#blocks .cell")].at(-1).dispatchEvent(new Event("pointerenter"));
  const marked = (selector) => document.querySelectorAll(selector).length;
  seen.push([marked(".node.held"), marked(".cell.same"), location.hash]);
  click(byId("theme"));
  press(document.body, " ");
  setTimeout(() => { root.dataset.seen = JSON.stringify([...seen, [state.step, state.playing]]); }, 9000);
});
</script>
</body>"""


@needs_browser
def test_it_answers_clicks_keys_and_pointers(tmp_path: Path) -> None:
    run = json.loads(trace("small"))
    page = render(run).replace("</body>", ACTIONS)
    document, said = browse(tmp_path, page)
    assert console(said) == []
    (found,) = re.findall(r'data-seen="([^"]*)"', document)
    start, folded, opened, first, second, released, stepped, marked, played = json.loads(html.unescape(found))
    total = len(run["nodes"])
    assert start == [len(run["steps"]), None, total]
    assert folded[2] < opened[2] <= total, "dead branches fold away and open again"
    assert first[1] is not None
    assert run["nodes"][second[1]]["parent"] == first[1], "an arrow key goes to the child"
    assert released[1] is None
    assert stepped[0] == 2
    assert marked[0] >= 1, "the tokens that a block holds"
    assert marked[1] >= 1, "the rows that share a block"
    assert marked[2] == "#step=2"
    assert played == [len(run["steps"]), None], "it plays to the end and stops"
