"""``folo bench`` on a model without weights: what it runs, in which order, and what it reports."""

from __future__ import annotations

import json
import os

import attrs
import pytest
from typer.testing import CliRunner

from folo_cli import bench as bench_command
from folo_cli.bench import Workload
from folo_core.config import EngineConfig
from folo_core.errors import FoloError
from folo_core.llm import LLM
from folo_core.plugins.manager import load_registry
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer


class Peer:
    """Continues prompts as the fake model does without a cache, and remembers its batches."""

    def __init__(self, model: FakeModel, wrong: bool = False) -> None:  # noqa: FBT001, FBT002
        self.model = model
        self.wrong = wrong
        self.batches: list[list[int]] = []

    def generate(self, prompts, max_tokens):
        self.batches.append(list(max_tokens))
        answers = [self.model.expected_tokens(p, count) for p, count in zip(prompts, max_tokens, strict=True)]
        return [[0] * len(answer) for answer in answers] if self.wrong else answers


class PeerPlugin(FakePlugin):
    """A loader that can open a peer."""

    peer: Peer

    def open_peer(self, name):
        assert name == "other"
        return self.peer


@pytest.fixture
def bench(monkeypatch):
    """Run ``folo bench`` on a fake model, with a peer called ``other``."""
    model = FakeModel()
    model.info = attrs.evolve(model.info, eos_token_ids=())
    plugin = PeerPlugin(model, FakeTokenizer())
    plugin.peer = Peer(model)
    registry = load_registry(extra=[plugin])
    config = EngineConfig.from_options(model="fake", loader="fake", attention="fake", num_blocks=512, block_size=4)
    monkeypatch.setattr("folo_core.plugins.manager.load_registry", lambda **_: registry)
    monkeypatch.setattr(bench_command, "_open", lambda *_: LLM.from_config(config, registry))

    def run(*arguments):
        result = CliRunner().invoke(bench_command.app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    run.peer = plugin.peer
    return run


SMALL = ("--requests", "10", "--prompt-tokens", "2-9", "--output-tokens", "3-12", "--rounds", "2")


def test_throughput_alone(bench):
    report = json.loads(bench("throughput", *SMALL, "--json").stdout)
    workload = Workload.draw(0, 10, (2, 9), (3, 12), 64)
    assert report["requests"] == 10
    assert (report["quantization"], report["weight_bytes"]) == (None, 0)
    assert report["output_tokens"] == sum(workload.output_lengths)
    assert report["prompt_tokens"] == sum(map(len, workload.prompts))
    rate = report["engines"]["folo"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert report["times_as_fast_as"] == {}
    assert report["rounds"] == 2
    assert 0 < report["fewest_cores_at_hand"] <= report["cores"]


def test_throughput_against_a_peer(bench):
    result = bench("throughput", *SMALL, "--against", "other", "--json")
    report = json.loads(result.stdout)
    one_by_one, batches = "other, one by one", "other, static batches of 8"
    assert list(report["engines"]) == ["folo", one_by_one, batches]
    assert report["requests_with_equal_tokens"] == {one_by_one: 10, batches: 10}
    assert set(report["times_as_fast_as"]) == {one_by_one, batches}
    # Static batches are sorted by length: the order in which they waste the least.
    lengths = sorted(Workload.draw(0, 10, (2, 9), (3, 12), 64).output_lengths)
    assert [batch for batch in bench.peer.batches if len(batch) == 8] == [lengths[:8]] * 2
    assert [batch for batch in bench.peer.batches if batch == lengths[8:]] == [lengths[8:]] * 2
    # Rounds are interleaved.
    names = [line.split("  ")[1].split(":")[0] for line in result.stderr.splitlines() if line.startswith("round")]
    assert names == ["folo", one_by_one, batches] * 2


def test_different_tokens_are_told(bench):
    bench.peer.wrong = True
    report = json.loads(bench("throughput", *SMALL, "--against", "other", "--json").stdout)
    assert set(report["requests_with_equal_tokens"].values()) == {0}


def test_latency(bench):
    result = bench("latency", "--prompt-tokens", "5", "--output-tokens", "9", "--rounds", "3", "--against", "other")
    assert "engines: folo: first token " in result.stdout
    assert "requests with equal tokens: other: 1" in result.stdout
    assert bench.peer.batches.count([1]) == 3
    assert bench.peer.batches.count([9]) == 3


@pytest.mark.parametrize("text", ["0-4", "9-3", "many", "3-", "-5"])
def test_a_bad_range_is_refused(bench, text):
    del bench
    result = CliRunner().invoke(bench_command.app, ["throughput", f"--prompt-tokens={text}"])
    assert result.exit_code == 2
    assert "16-256" in result.output


def test_an_engine_that_stops_early_is_no_contestant():
    workload = Workload.draw(1, 3, (2, 4), (5, 5), 64)
    lazy = bench_command.Contestant("lazy", lambda w: [[0]] * len(w.prompts))
    with pytest.raises(FoloError, match="lazy did not generate the lengths"):
        bench_command._interleave([lazy], workload, 1)


def test_no_loader_opens_the_peer(monkeypatch):
    model = FakeModel()
    plugin = FakePlugin(model, FakeTokenizer())
    registry = load_registry(extra=[plugin])
    monkeypatch.setattr("folo_core.plugins.manager.load_registry", lambda **_: registry)
    config = EngineConfig.from_options(model="fake", loader="fake", attention="fake", num_blocks=64, block_size=4)
    with pytest.raises(FoloError, match="no installed loader can open 'fake' in another engine"):
        bench_command._open_peer(LLM.from_config(config, registry), "other")


def test_threads_are_set_before_the_model_is_loaded(monkeypatch):
    seen = {}

    def note(**options):
        seen.update(options, threads=os.environ["OMP_NUM_THREADS"])

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr("folo_core.llm.LLM", note)
    numbers = {"dtype": "auto", "quantization": "int4", "kv_cache_dtype": "auto"}
    bench_command._open("demo", numbers, 2, 100)
    assert seen == {"model": "demo", **numbers, "max_num_seqs": 100, "threads": "2"}
