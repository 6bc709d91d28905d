"""The record is faithful: every live row's tokens, every answer and every block count can be read back from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import SamplerPlugin, TreeParams, TreeSampler, greedy, make_llm
from folo_core.errors import FoloError
from folo_core.sampling.interface import SamplerOutput
from folo_core.testing.fakes import FakeModel
from folo_core.validation import rule
from folo_trace.command import record
from folo_trace.recorder import Recorder
from folo_trace.tree import ROOT, path_to


class Witness(TreeSampler):
    """Notes what each request's live rows hold before every step, from the engine's own sequences."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random.seed(seed)
        self.seen: list[dict[int, list[int]]] = []
        self.request: Any = None

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        self.request = request

    def step(self, logits: Any, metadata: Any) -> SamplerOutput:
        self.seen.append({s.seq_id: list(s.data.output_token_ids) for s in self.request.live})
        return super().step(logits, metadata)


class Books:
    """Counts of the block pool, read while the model runs and right after each record."""

    def __init__(self, llm: Any, model: FakeModel, recorder: Recorder) -> None:
        self.pool = llm.engine.state.kv.pool
        self.in_use: list[int] = []
        self.references: list[dict[int, int]] = []
        model.before_forward = lambda _: self.in_use.append(self.pool.num_usable - self.pool.num_free)
        hear = recorder.on_branches

        def listen(entry: Any) -> None:
            hear(entry)
            blocks = {block for row in entry.blocks.values() for block in row}
            self.references.append({block: self.pool.references(block) for block in blocks})

        recorder.on_branches = listen  # type: ignore[method-assign]


def trace_tree(prompt: str, *, width: int, max_tokens: int, seed: int, **options: Any) -> tuple[Any, ...]:
    model, sampler, recorder = FakeModel(), Witness(seed), Recorder()
    llm = make_llm(model, plugins=[recorder, SamplerPlugin(sampler)], **options)
    books = Books(llm, model, recorder)
    run = record(llm, recorder, prompt, TreeParams(width=width, max_tokens=max_tokens, logprobs=0))
    return run, sampler, books


def tokens_of(run: dict[str, Any], node: int) -> list[int]:
    return [run["nodes"][i]["token_id"] for i in path_to(run["nodes"], node)]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text("abcdefgh", min_size=1, max_size=20),
    width=st.integers(1, 6),
    max_tokens=st.integers(1, 14),
    seed=st.integers(0, 2**16),
    block_size=st.sampled_from([1, 4, 8]),
)
def test_a_trace_is_faithful(prompt: str, width: int, max_tokens: int, seed: int, block_size: int) -> None:
    options = {"width": width, "max_tokens": max_tokens, "seed": seed, "block_size": block_size}
    run, sampler, books = trace_tree(prompt, **options)
    for step, seen in zip(run["steps"], [*sampler.seen[1:], None], strict=True):
        rows = {row["sequence"]: tokens_of(run, row["node"]) for row in step["rows"]}
        assert rows == ({} if seen is None else seen), "every live row's tokens"
        shares = Counter(block for row in step["rows"] for block in row["blocks"])
        assert shares == books.references[step["step"] - 1], "a block's sharers are the pool's references"
        for row in step["rows"]:
            assert len(row["blocks"]) == -(-row["cached"] // block_size)
    assert [step["blocks_held"] for step in run["steps"]] == books.in_use, "blocks in use while the step ran"
    assert run["summary"]["peak_blocks"] == max(books.in_use)
    assert run["summary"]["forks"] == sum(len(step["forks"]) for step in run["steps"])


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 6), max_tokens=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_answers_end_at_their_own_leaves(width: int, max_tokens: int, seed: int) -> None:
    model, sampler, recorder = FakeModel(), Witness(seed), Recorder()
    llm = make_llm(model, plugins=[recorder, SamplerPlugin(sampler)])
    run = record(llm, recorder, "abc", TreeParams(width=width, max_tokens=max_tokens))
    finished = sampler.finish(sampler.request)
    assert [tokens_of(run, a["node"]) for a in run["answers"]] == [s.data.output_token_ids for s in finished]
    leaves = [answer["node"] for answer in run["answers"]]
    assert len(set(leaves)) == len(leaves)
    assert [run["nodes"][leaf]["answer"] for leaf in leaves] == list(range(len(leaves)))
    ended = [node for node in run["nodes"] if node["status"] == "ended"]
    assert {node["id"] for node in ended} == set(leaves)
    assert all(node["reason"] in ("stop", "length") for node in ended)


def test_the_cases_that_matter_happen() -> None:
    """What the tests above compare is a tree that forks, prunes, shares full blocks and copies shared tails."""
    run, sampler, _ = trace_tree("abcdefg", width=5, max_tokens=12, seed=3)
    assert sampler.reparented
    assert run["summary"]["forks"] > 3
    assert run["summary"]["pruned"] > 3
    assert any(node["status"] == "pruned" and node["died"] == node["step"] + 1 for node in run["nodes"])
    assert run["summary"]["peak_blocks"] < run["summary"]["peak_blocks_separate"]
    rows = [row for step in run["steps"] for row in step["rows"]]
    assert any(row["cached"] % 4 for row in rows)
    branched = Counter(node["parent"] for node in run["nodes"])
    assert max(branched.values()) > 1


def test_nodes_are_a_tree_in_order() -> None:
    run, _, _ = trace_tree("abc", width=4, max_tokens=10, seed=1)
    for place, node in enumerate(run["nodes"]):
        assert node["id"] == place
        assert ROOT <= node["parent"] < place
        parent = None if node["parent"] == ROOT else run["nodes"][node["parent"]]
        assert node["depth"] == (1 if parent is None else parent["depth"] + 1)
        assert parent is None or parent["step"] <= node["step"]
    dead = [node["id"] for node in run["nodes"] if node["status"] == "pruned"]
    assert not {node["parent"] for node in run["nodes"]} & set(dead), "nothing grows where a branch died"


def test_greedy_is_one_chain_whose_texts_join_to_the_answer() -> None:
    recorder = Recorder()
    params = greedy(max_tokens=9, ignore_eos=True, skip_special_tokens=False)
    run = record(make_llm(plugins=[recorder]), recorder, "hello", params)
    assert [node["parent"] for node in run["nodes"]] == list(range(-1, len(run["nodes"]) - 1))
    assert "".join(node["text"] for node in run["nodes"]) == run["answers"][0]["text"]
    assert all(node["logprob"] is not None for node in run["nodes"]), "the answer's own log probabilities"
    assert all(node["alternatives"][0][1] == node["logprob"] for node in run["nodes"]), "greedy takes the likeliest"
    assert run["params"] == {
        "temperature": 0.0,
        "max_tokens": 9,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert run["strategy"].endswith(":greedy")


class Jumper(TreeSampler):
    """Row 0 is held while another child of it grows; tokens come two at a time; log probabilities are stated."""

    def step(self, logits: Any, metadata: Any) -> SamplerOutput:
        import torch

        if logits.shape[0] == 1 and metadata.positions is not None and not self.reparented:
            self.reparented = 1
            tokens = torch.tensor([[-1, -1], [5, 6]])
            return SamplerOutput(
                parents=torch.tensor([0, 0]), tokens=tokens, logprobs=torch.tensor([[0, 0], [-1.0, -2]])
            )
        rows = logits.shape[0]
        return SamplerOutput(
            parents=torch.arange(rows), tokens=torch.full((rows, 1), 7), logprobs=torch.full((rows, 1), -3.0)
        )


def test_held_rows_and_several_tokens_a_step_are_told() -> None:
    recorder = Recorder()
    llm = make_llm(plugins=[recorder, SamplerPlugin(Jumper())])
    run = record(llm, recorder, "abc", TreeParams(width=2, max_tokens=3, detokenize=False))
    first, second, *_ = run["nodes"]
    assert (first["token_id"], first["step"], first["logprob"]) == (5, 1, -1.0)
    assert (second["token_id"], second["step"], second["parent"], second["logprob"]) == (6, 1, 0, -2.0)
    assert [row["node"] for row in run["steps"][0]["rows"]] == [ROOT, 1], "the held row is where the prompt ends"
    assert sorted(tokens_of(run, a["node"]) for a in run["answers"]) == [[5, 6, 7], [7, 7, 7]]


def test_tokens_past_the_end_of_an_answer_are_no_part_of_the_tree() -> None:
    recorder = Recorder()
    llm = make_llm(plugins=[recorder, SamplerPlugin(Jumper())])
    run = record(llm, recorder, "abc", TreeParams(width=2, max_tokens=3, stop_token_ids=[5]))
    assert run["nodes"][0]["status"] == "ended"
    assert 6 not in [node["token_id"] for node in run["nodes"]], "it came with the stop token, in one step"
    assert sorted(tokens_of(run, a["node"]) for a in run["answers"]) == [[5], [7, 7, 7]]


def test_a_request_that_fails_raises_its_own_error() -> None:
    model, recorder = FakeModel(), Recorder()
    model.edit_logits = lambda logits, _: logits * float("nan")
    with pytest.raises(FoloError, match="cannot be sampled"):
        record(make_llm(model, plugins=[recorder]), recorder, "abc", greedy())


class Judge(Jumper):
    """Scores that JSON has no number for."""

    def step(self, logits: Any, metadata: Any) -> SamplerOutput:
        import torch

        scores = torch.tensor([float("-inf")] * len(logits))
        tokens = logits.argmax(-1, keepdim=True)
        stated = torch.full_like(scores, float("nan"))[:, None]
        return SamplerOutput(parents=torch.arange(len(logits)), tokens=tokens, scores=scores, logprobs=stated)


@attrs.frozen(slots=True, kw_only=True)
class JudgedParams(TreeParams):
    scorer: Callable[..., float] = attrs.field(default=max, metadata=rule(callable, "must be a function"))


def test_what_json_cannot_say_is_null_or_a_name() -> None:
    recorder = Recorder()
    llm = make_llm(plugins=[recorder, SamplerPlugin(Judge(), JudgedParams)])
    run = record(llm, recorder, "abc", JudgedParams(width=1, max_tokens=3, scorer=tokens_of))
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert {node["score"] for node in run["nodes"]} == {None}
    assert run["params"]["scorer"] == "tokens_of"


def test_an_engine_without_a_recorder_observes_no_branches() -> None:
    assert make_llm().engine.reporter.observers.of_branches == []


def test_the_trace_is_plain_json() -> None:
    run, _, _ = trace_tree("abc", width=3, max_tokens=5, seed=2)
    assert (run["format"], run["version"]) == ("folo-trace", 1)
    again = json.loads(json.dumps(run))
    assert again["nodes"] == json.loads(json.dumps(run["nodes"]))
    assert again["summary"] == run["summary"]
