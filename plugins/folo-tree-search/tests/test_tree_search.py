"""Tree search: exact against enumeration, the same under preemption and beside neighbours, faults of its scorer."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import ObserverPlugin, assert_clean, greedy, make_engine, make_llm, run
from folo_core.errors import ParamsError
from folo_core.sampling_params import SamplingParams
from folo_core.testing.conformance import PluginConformance, SamplerConformance
from folo_core.testing.fakes import FakeModel
from folo_tree_search import Node, TreeSearchParams, mean_logprob

if TYPE_CHECKING:
    from collections.abc import Callable

    from folo_core.outputs import RequestOutput


class TestPlugin(PluginConformance):
    plugin = "folo-tree-search"


class TestSampler(SamplerConformance):
    plugin, name = "folo-tree-search", "tree-search"

    def params(self, part):
        return [
            TreeSearchParams(),
            TreeSearchParams(segment_tokens=1, width=4, branching=2, n=2, seed=1),
            TreeSearchParams(segment_tokens=2, width=5, branching=5, top_k=3, parallel_expansions=2),
            TreeSearchParams(segment_tokens=2, expansions=1, temperature=0.0, scorer=hashed),
            TreeSearchParams(segment_stop_token_ids=list(range(0, 37, 2)), scorer=hashed, stopping="first"),
        ]


def hashed(node: Node) -> float:
    """Any number, from the tokens alone."""
    return zlib.crc32(repr(node.token_ids).encode()) / 2**32


def total_logprob(node: Node) -> float:
    return node.cumulative_logprob


class Branches(ObserverPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.branches: list[Any] = []

    def on_branches(self, record: Any) -> None:
        self.branches.append(record)

    def counts(self) -> dict[str, int]:
        forks = sum(len(b.parents) - len(set(b.parents)) for b in self.branches)
        held = sum(tokens == [] for b in self.branches for tokens in b.tokens)
        # Rows that grow while another row of their request is born or pruned.
        opened = sum(self._meanwhile(b, lambda b: len(set(b.parents)) < len(b.parents)) for b in self.branches)
        closed = sum(self._meanwhile(b, lambda b: bool(b.pruned)) for b in self.branches)
        return {
            "forks": forks,
            "held": held,
            "pruned": sum(len(b.pruned) for b in self.branches),
            "opened meanwhile": opened,
            "closed meanwhile": closed,
        }

    @staticmethod
    def _meanwhile(branch: Any, happened: Callable[[Any], bool]) -> bool:
        alone = [p for p, tokens in zip(branch.parents, branch.tokens, strict=True) if tokens]
        return happened(branch) and any(alone.count(parent) == 1 for parent in alone)


# --- exactness -------------------------------------------------------------------------------------------------------


def every_answer(model: FakeModel, prompt: list[int], most: int) -> list[Node]:
    """Every complete answer, with its log probability."""
    done: list[Node] = []
    growing: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while growing:
        tokens, total = growing.pop()
        log_probs = model.logits_after([*prompt, *tokens]).log_softmax(-1).tolist()
        for token, log_prob in enumerate(log_probs):
            answer = (*tokens, token)
            complete = token == model.info.vocab_size - 1 or len(answer) == most
            if complete:
                done.append(
                    Node(
                        prompt_token_ids=tuple(prompt),
                        token_ids=answer,
                        text=None,
                        cumulative_logprob=total + log_prob,
                        is_complete=True,
                    )
                )
            else:
                growing.append((answer, total + log_prob))
    return done


def search(model: FakeModel, prompt: list[int], params: TreeSearchParams, **options: Any) -> tuple[RequestOutput, int]:
    """Run one search; return its output and the number of engine steps."""
    watch = ObserverPlugin()
    settings = {"max_num_seqs": 256, "num_blocks": 2048, "plugins": [watch]} | options
    engine, _ = make_engine(model, **settings)
    engine.add_request("a", prompt, params)
    output = run(engine)["a"]
    assert_clean(engine)
    return output, len(watch.records)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 999),
    vocab=st.integers(3, 4),
    most=st.integers(1, 3),
    scorer=st.sampled_from([hashed, mean_logprob, total_logprob]),
    numbers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_an_unlimited_search_finds_the_best_answers_of_all(seed, vocab, most, scorer, numbers):
    n, parallel = numbers
    model = FakeModel(vocab_size=vocab, seed=seed)
    calls: list[tuple[int, ...]] = []

    def counted(node: Node) -> float:
        calls.append(node.token_ids)
        return scorer(node)

    params = TreeSearchParams(
        n=n, width=64, branching=vocab, expansions=None, segment_tokens=1, max_tokens=most, stopping="never",
        scorer=counted, parallel_expansions=parallel, seed=seed,
    )  # fmt: skip
    output, _ = search(model, [1, 2], params)
    answers = sorted(every_answer(model, [1, 2], most), key=scorer, reverse=True)
    assert [c.score for c in output.outputs] == pytest.approx([scorer(a) for a in answers[:n]], abs=1e-5)
    if scorer is hashed:  # no ties
        assert [tuple(c.token_ids) for c in output.outputs] == [a.token_ids for a in answers[:n]]
    every_node = {a.token_ids[:length] for a in answers for length in range(1, len(a.token_ids) + 1)}
    assert sorted(calls) == sorted(every_node), "each node is scored once, and no other"


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), n=st.integers(1, 3))
def test_with_a_bound_for_a_scorer_it_stops_early_and_is_still_exact(seed, n):
    """No answer is more likely than its beginning, so the search may stop before it has seen the whole tree."""
    model = FakeModel(vocab_size=4, seed=seed)
    params = {
        "n": n, "width": 128, "branching": 4, "expansions": None, "segment_tokens": 1, "max_tokens": 4,
        "scorer": total_logprob, "seed": seed,
    }  # fmt: skip
    output, steps = search(model, [3], TreeSearchParams(**params))
    answers = sorted(every_answer(model, [3], 4), key=total_logprob, reverse=True)
    assert [tuple(c.token_ids) for c in output.outputs] == [a.token_ids for a in answers[:n]]
    assert [c.score for c in output.outputs] == pytest.approx([a.cumulative_logprob for a in answers[:n]], abs=1e-5)
    assert [c.cumulative_logprob for c in output.outputs] == pytest.approx([c.score for c in output.outputs], abs=1e-5)
    _, all_steps = search(model, [3], TreeSearchParams(stopping="never", **params))
    first, first_steps = search(model, [3], TreeSearchParams(stopping="first", **params))
    assert first_steps <= steps < all_steps
    assert len(first.outputs) == n


def test_temperature_0_branches_into_the_most_likely_tokens():
    model = FakeModel()
    params = TreeSearchParams(n=3, width=3, branching=3, max_tokens=1, temperature=0.0)
    output, _ = search(model, [5, 6], params)
    assert [c.token_ids for c in output.outputs] == model.logits_after([5, 6]).topk(3).indices[:, None].tolist()


def test_without_branches_it_samples_as_the_plain_sampler_does():
    model = FakeModel()
    fields: dict[str, Any] = {"max_tokens": 20, "seed": 3, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
    plain, _ = search(model, [5, 6], SamplingParams(**fields))
    tree, _ = search(model, [5, 6], TreeSearchParams(width=1, branching=1, segment_tokens=3, **fields))
    assert tree.outputs[0].token_ids == plain.outputs[0].token_ids


def test_first_tokens_are_drawn_without_replacement_with_the_right_frequencies():
    """Two branches of one leaf: the chance of each ordered pair is p(a) p(b) / (1 - p(a))."""
    probs = [0.5, 0.3, 0.15, 0.05]
    model = FakeModel(vocab_size=4)
    model.edit_logits = lambda logits, _: torch.tensor(probs).log().expand(len(logits), 4).clone()
    count = 3000
    engine, _ = make_engine(model, max_num_seqs=256, num_blocks=2048)
    for i in range(count):
        engine.add_request(str(i), [1], TreeSearchParams(n=2, width=2, branching=2, max_tokens=1, seed=i))
    found: dict[tuple[int, ...], int] = {}
    for output in run(engine, most_steps=10_000).values():
        pair = tuple(sorted(c.token_ids[0] for c in output.outputs))
        found[pair] = found.get(pair, 0) + 1
    expected = {
        (a, b): count * (probs[a] * probs[b] / (1 - probs[a]) + probs[a] * probs[b] / (1 - probs[b]))
        for a, b in itertools.combinations(range(4), 2)
    }
    assert set(found) <= set(expected)
    chi_square = sum((found.get(pair, 0) - e) ** 2 / e for pair, e in expected.items())
    assert chi_square < 20.5, "p = 0.001 of 5 degrees of freedom"


def test_no_random_number_is_used_twice():
    engine, _ = make_engine(max_num_seqs=64)
    sampler = engine.executor.runner.stage.samplers["folo-tree-search:tree-search"].part
    plain, keys = sampler._plain, []

    class Recorder:
        def step(self, logits: torch.Tensor, metadata: Any) -> Any:
            columns = (metadata.sequence_indices.tolist(), metadata.positions.tolist())
            keys.extend(zip(metadata.request_ids, *columns, strict=True))
            return plain.step(logits, metadata)

    sampler._plain = Recorder()
    for i in range(3):
        params = TreeSearchParams(
            width=8, branching=3 - i % 2, segment_tokens=1 + i, parallel_expansions=3, scorer=hashed, max_tokens=20
        )
        engine.add_request(str(i), [i, 1], params)
    run(engine)
    assert len(keys) > 200
    assert len(set(keys)) == len(keys)


# --- the search as a policy ------------------------------------------------------------------------------------------


def test_a_spent_budget_writes_the_best_leaves_to_their_ends_unscored():
    lengths: list[int] = []

    def prefers_long(node: Node) -> float:
        lengths.append(len(node.token_ids))
        return float(len(node.token_ids))

    params = TreeSearchParams(
        n=2, width=6, branching=2, expansions=3, segment_tokens=4, max_tokens=40, ignore_eos=True, scorer=prefers_long
    )
    watch = Branches()
    output, _ = search(FakeModel(), [1], params, plugins=[watch])
    assert [len(c.token_ids) for c in output.outputs] == [40, 40]
    assert lengths == [4, 4, 8, 8, 12, 12, 40, 40], "each segment once, and then only the answers"
    assert watch.counts()["pruned"] == 2
    assert output.outputs[0].score == 40.0


def test_segments_end_at_stop_tokens():
    ends: list[tuple[int, ...]] = []

    def note(node: Node) -> float:
        if not node.is_complete:
            ends.append(node.token_ids)
        return 0.0

    stops = list(range(0, 64, 8))
    params = TreeSearchParams(
        segment_stop_token_ids=stops, segment_tokens=9, max_tokens=60, expansions=12, ignore_eos=True, scorer=note
    )
    search(FakeModel(), [1], params)
    lengths = {tokens: len(tokens) for tokens in ends}
    assert {tokens[-1] in stops for tokens in ends} == {True, False}
    for tokens, length in lengths.items():
        parents = [lengths[other] for other in ends if other == tokens[: len(other)] and len(other) < length]
        start = max(parents, default=0)
        assert (length - start == 9) or tokens[-1] in stops
        assert not any(token in stops for token in tokens[start:-1])


def test_never_more_rows_than_the_width_and_the_worst_leaves_make_room():
    watch = Branches()
    params = TreeSearchParams(
        width=5, branching=3, expansions=20, segment_tokens=2, max_tokens=30, ignore_eos=True, scorer=hashed, seed=0
    )
    output, _ = search(FakeModel(), [1], params, plugins=[watch])
    assert max(len(b.rows) for b in watch.branches) == 5
    closed = [b for b in watch.branches if b.pruned]
    assert len(closed) > 5
    assert output.error is None


TREES = 9


def run_mixed(order: int = 1, **options: Any) -> tuple[dict[str, Any], int, Branches]:
    watch = Branches()
    model = FakeModel()
    settings = {"num_blocks": 2048, "max_num_seqs": 64, "max_model_len": 64, "plugins": [watch]} | options
    engine, _ = make_engine(model, **settings)
    for i in range(TREES)[::order]:
        params = TreeSearchParams(
            n=1 + i % 2, width=4 + i % 4, branching=2 + i % 2, segment_tokens=1 + i % 4, expansions=6 + i,
            parallel_expansions=1 + i % 3, scorer=[mean_logprob, hashed][i % 2], seed=i, ignore_eos=i < 2,
            repetition_penalty=1.1, temperature=1.5, segment_stop_token_ids=range(i, 64, 5), max_tokens=24,
        )  # fmt: skip
        engine.add_request(f"tree-{i}", [i + 1, 2, 3], params)
        engine.add_request(f"plain-{i}", [9, i], greedy(max_tokens=9 + i))
    metrics = [request.metrics for request in engine.requests.values()]
    final = run(engine)
    assert_clean(engine)
    answers = {
        name: (output.error, [(c.token_ids, c.score, c.cumulative_logprob, c.text) for c in output.outputs])
        for name, output in final.items()
    }
    return answers, sum(m.num_preemptions for m in metrics), watch


def test_it_equals_itself_when_preempted_though_it_forks_prunes_and_holds():
    calm, none, watch = run_mixed()
    assert none == 0
    assert all(error is None for error, _ in calm.values())
    counts = watch.counts()
    assert min(counts.values()) > 0, counts
    tight, preemptions, _ = run_mixed(num_blocks=50, max_num_batched_tokens=64)
    assert preemptions > 3
    assert tight == calm


def test_neighbours_and_order_change_nothing():
    together, _, _ = run_mixed()
    assert run_mixed(order=-1)[0] == together
    # One request at a time, nearly: a tree of width 7 leaves a place for a plain one.
    assert run_mixed(max_num_seqs=8)[0] == together
    assert len({repr(together[f"tree-{i}"]) for i in range(TREES)}) == TREES


def test_abort_in_the_middle_returns_everything():
    engine, _ = make_engine(max_num_seqs=32)
    params = TreeSearchParams(segment_tokens=2, max_tokens=60, ignore_eos=True, scorer=hashed)
    engine.add_request("a", [1, 2, 3], params)
    for _ in range(9):
        engine.step()
    assert len(engine.requests["a"].live) > 2
    assert engine.abort("a")[0].outputs[0].finish_reason == "abort"
    assert_clean(engine)


def test_a_fork_of_a_plain_request_searches_on_from_its_tokens():
    engine, model = make_engine(max_num_seqs=32)
    engine.add_request("plain", [1, 2], greedy(max_tokens=12, ignore_eos=True))
    for _ in range(5):
        engine.step()
    params = TreeSearchParams(max_tokens=12, segment_tokens=2, ignore_eos=True, scorer=hashed, seed=1)
    engine.fork("plain", "tree", at=4, params=params)
    final = run(engine)
    answer = final["tree"].outputs[0].token_ids
    assert answer[:4] == model.expected_tokens([1, 2], 4)
    assert len(answer) == 12
    assert final["tree"].outputs[0].score == zlib.crc32(repr(tuple(answer)).encode()) / 2**32
    assert_clean(engine)


def test_logprobs_asked_for_do_not_change_the_search():
    params = {"max_tokens": 12, "segment_tokens": 3, "seed": 2, "repetition_penalty": 1.5, "ignore_eos": True}
    without, _ = search(FakeModel(), [1], TreeSearchParams(**params))
    given_, _ = search(FakeModel(), [1], TreeSearchParams(logprobs=2, **params))
    assert [c.token_ids for c in given_.outputs] == [c.token_ids for c in without.outputs]
    assert [c.score for c in given_.outputs] == [c.score for c in without.outputs]
    assert len(given_.outputs[0].logprobs) == len(given_.outputs[0].token_ids)


# --- the scorer's faults ---------------------------------------------------------------------------------------------


def raising(node: Node) -> float:
    if len(node.token_ids) >= 8:
        raise ZeroDivisionError("no such luck")
    return 0.0


def at_the_end(node: Node) -> float:
    return math.nan if node.is_complete else 0.0


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (raising, "scorer: raising failed after 8 tokens: ZeroDivisionError: no such luck"),
        (at_the_end, "scorer: at_the_end failed after 24 tokens: ValueError: it returned NaN"),
        (lambda _: None, "<lambda> failed after 4 tokens: TypeError"),
        (lambda _: math.nan, "<lambda> failed after 4 tokens: ValueError: it returned NaN"),
    ],
)
def test_a_failing_scorer_ends_its_own_request_alone(scorer, words):
    fields = {"max_tokens": 24, "segment_tokens": 4, "ignore_eos": True, "expansions": 9, "width": 6}

    def answers(**scorers: Any) -> dict[str, RequestOutput]:
        engine, _ = make_engine(max_num_seqs=64)
        for i, (name, given_scorer) in enumerate(scorers.items()):
            engine.add_request(name, [i, 1], TreeSearchParams(scorer=given_scorer, seed=i, **fields))
        engine.add_request("plain", [7, 7], greedy())
        final = run(engine)
        assert_clean(engine)
        return final

    final = answers(one=hashed, bad=scorer, two=hashed)
    assert isinstance(final["bad"].error, ParamsError)
    assert words in str(final["bad"].error)
    sound = answers(one=hashed, bad=hashed, two=hashed)
    for name in ("one", "two", "plain"):
        assert final[name].error is None
        assert [c.token_ids for c in final[name].outputs] == [c.token_ids for c in sound[name].outputs]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 2, "branching": 3}, "branching: 3: must be <= width (2)"),
        ({"n": 9}, "n: 9: must be <= width (8)"),
        ({"best_of": 9}, "best_of: 9: must be <= width (8)"),
        ({"scorer": "len"}, "scorer: 'len': must be a function"),
        ({"stopping": "soon"}, "stopping: 'soon': must be one of first, bound, never"),
        ({"expansions": 0}, "expansions: 0"),
        ({"segment_stop_token_ids": [-1]}, "segment_stop_token_ids"),
    ],
)
def test_wrong_parameters_are_refused_by_name(fields, words):
    with pytest.raises(ParamsError) as caught:
        TreeSearchParams(**fields)
    assert words in str(caught.value)


def test_a_width_beyond_the_cap_is_refused_at_admission():
    engine, _ = make_engine(max_num_seqs=512, max_sequences_per_request=16, num_blocks=4096)
    with pytest.raises(ParamsError, match=r"width: 17: must be <= 16 \(max_sequences_per_request\)"):
        engine.add_request("a", [1], TreeSearchParams(width=17))


def test_the_scorer_sees_the_text_and_the_prompt():
    seen: list[Node] = []

    def look(node: Node) -> float:
        seen.append(node)
        return hashed(node)

    llm = make_llm()
    params = TreeSearchParams(max_tokens=12, segment_tokens=4, expansions=4, scorer=look, seed=1, ignore_eos=True)
    output = llm.generate(["AB"], params)[0]
    assert {node.prompt_token_ids for node in seen} == {(33, 34)}
    assert all(
        node.text == llm.get_tokenizer().decode(list(node.token_ids), skip_special_tokens=True)
        for node in seen
        if not node.is_complete
    )
    best = max((node for node in seen if node.is_complete), key=hashed)
    assert output.outputs[0].token_ids == list(best.token_ids)
    assert [output.finished, len(output.outputs)] == [True, 1]
