"""The step loop against a model that needs no cache: continuous batching, chunking, preemption, forks, abort."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines import (
    DeferredExecutor,
    ObserverPlugin,
    SamplerPlugin,
    TreeParams,
    TreeSampler,
    assert_clean,
    greedy,
    make_engine,
    run,
    watch_pasts,
)
from folo_core.engine.engine import Engine
from folo_core.errors import ParamsError, RequestError
from folo_core.sampling_params import RequestOutputKind, SamplingParams
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel, fake_components

PROMPT = st.lists(st.integers(0, FAKE_VOCAB - 2), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPT, st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=10),
    blocks=st.integers(11, 40),
    tokens=st.integers(4, 40),
    seqs=st.integers(1, 4),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_any_batching_gives_every_request_what_it_gets_alone(
    requests: list[tuple[list[int], int, int]], blocks: int, tokens: int, seqs: int, policy: str
) -> None:
    engine, model = make_engine(
        num_blocks=blocks, max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=44, policy=policy
    )
    final: dict[str, Any] = {}
    arrivals = sorted(enumerate(requests), key=lambda item: item[1][2])
    step = 0
    while arrivals or engine.has_unfinished_requests:
        while arrivals and arrivals[0][1][2] <= step:
            place, (prompt, count, late) = arrivals.pop(0)
            engine.add_request(str(place), prompt, greedy(max_tokens=count), priority=late % 3)
        final |= {o.request_id: o for o in engine.step() if o.finished}
        engine.check_integrity()
        step += 1
    for place, (prompt, count, _) in enumerate(requests):
        assert final[str(place)].outputs[0].token_ids == model.expected_tokens(prompt, count)
    assert_clean(engine)


def test_memory_pressure_preempts_and_changes_no_token() -> None:
    observer = ObserverPlugin()
    engine, model = make_engine(num_blocks=10, max_num_seqs=8, max_model_len=40, plugins=[observer])
    prompts = [[i, i + 1, i + 2, i + 3] for i in range(8)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(max_tokens=20, ignore_eos=True))
    final = run(engine)
    assert sum(output.metrics.num_preemptions for output in final.values()) >= 3
    assert sum(record.num_preempted for record in observer.records) >= 3
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(20):
            tokens.append(int(model.logits_after(tokens).argmax()))
        assert final[str(i)].outputs[0].token_ids == tokens[4:]
    assert final["0"].metrics.num_preemptions == 0, "the oldest is never the one that yields"
    assert_clean(engine)


def test_steps_stay_within_their_budgets_and_prompts_are_chunked() -> None:
    observer = ObserverPlugin()
    engine, _ = make_engine(
        max_num_batched_tokens=7, max_num_seqs=3, max_model_len=64, plugins=[observer], long_prefill_token_threshold=5
    )
    for i in range(6):
        engine.add_request(str(i), list(range(1, 20)), greedy(max_tokens=4))
    run(engine)
    assert all(record.num_tokens <= 7 and record.num_seqs <= 3 for record in observer.records)
    assert any(record.num_sampled == 0 for record in observer.records), "some step only computed a part of a prompt"
    assert any(record.num_tokens > record.num_seqs > 1 for record in observer.records), "prompt and decode in one step"


def test_without_chunked_prefill_a_prompt_runs_whole() -> None:
    observer = ObserverPlugin()
    engine, model = make_engine(
        max_num_batched_tokens=64, max_model_len=64, enable_chunked_prefill=False, plugins=[observer]
    )
    for i in range(5):
        engine.add_request(str(i), list(range(1, 31)), greedy(max_tokens=3))
    final = run(engine)
    assert final["0"].outputs[0].token_ids == model.expected_tokens(range(1, 31), 3)
    assert observer.records[0].num_tokens == 60
    assert observer.records[0].num_sampled == 2


def test_priority_runs_the_urgent_first_and_fcfs_the_oldest() -> None:
    order = {}
    for policy in ("fcfs", "priority"):
        engine, _ = make_engine(policy=policy, max_num_seqs=1)
        for i, urgency in enumerate([5, 0, 3]):
            engine.add_request(str(i), [1, 2], greedy(max_tokens=2, ignore_eos=True), priority=urgency)
        order[policy] = list(run(engine))
    assert order == {"fcfs": ["0", "1", "2"], "priority": ["1", "2", "0"]}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    blocks=st.integers(50, 80),
    tokens=st.integers(8, 40),
)
def test_forked_sequences_read_their_own_past_whatever_was_shared(
    seed: int, widths: list[int], blocks: int, tokens: int
) -> None:
    sampler = TreeSampler()
    sampler.random.seed(seed)
    engine, model = make_engine(
        num_blocks=blocks,
        max_num_batched_tokens=tokens,
        max_num_seqs=8,
        max_model_len=40,
        plugins=[SamplerPlugin(sampler)],
    )
    seen = watch_pasts(model)
    for i, width in enumerate(widths):
        engine.add_request(
            str(i), [i + 1] * (3 * i + 2), TreeParams(width=width, max_tokens=10, ignore_eos=True, temperature=0.0)
        )
    engine.add_request("plain", [9, 8, 7], greedy(max_tokens=12))
    final: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        live = {s.seq_id: list(s.data.token_ids) for r in engine.requests.values() for s in r.live}
        seen.clear()
        final |= {o.request_id: o for o in engine.step() if o.finished}
        assert all(past in live.values() for past in seen)
        engine.check_integrity()
    assert final["plain"].outputs[0].token_ids == model.expected_tokens([9, 8, 7], 12)
    assert all(len(completion.token_ids) == 10 for i in range(len(widths)) for completion in final[str(i)].outputs)
    assert not sampler.open
    assert_clean(engine)


def test_forks_share_blocks_and_survive_preemption() -> None:
    sampler = TreeSampler()
    engine, _ = make_engine(num_blocks=34, max_num_seqs=16, max_model_len=32, plugins=[SamplerPlugin(sampler)])
    shared = 0
    for i in range(4):
        engine.add_request(
            str(i), list(range(1, 17)), TreeParams(width=4, max_tokens=14, ignore_eos=True, temperature=0.0)
        )
    final: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        final |= {o.request_id: o for o in engine.step() if o.finished}
        tables = [s.block_table.blocks for r in engine.requests.values() for s in r.live if s.block_table]
        shared = max(shared, sum(map(len, tables)) - len({b for table in tables for b in table}))
        engine.check_integrity()
    assert sampler.reparented > 10
    assert shared >= 8, "candidates of one prompt hold its blocks together"
    assert sum(o.metrics.num_preemptions for o in final.values()) >= 1
    assert_clean(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("params", [greedy(max_tokens=30, ignore_eos=True), TreeParams(max_tokens=30, ignore_eos=True)])
def test_abort_at_any_time_returns_everything_and_twice_is_harmless(steps: int, params: SamplingParams) -> None:
    engine, model = make_engine(
        max_num_batched_tokens=8, max_num_seqs=8, max_model_len=64, plugins=[SamplerPlugin(TreeSampler())]
    )
    engine.add_request("gone", list(range(1, 21)), params)
    engine.add_request("stays", [5, 6], greedy())
    for _ in range(steps):
        engine.step()
    (output,) = engine.abort("gone")
    assert output.finished
    assert {c.finish_reason for c in output.outputs} == {"abort"}
    assert engine.abort("gone") == []
    assert engine.abort(["unknown"]) == []
    final = run(engine) if engine.has_unfinished_requests else {}
    assert not final or final["stays"].outputs[0].token_ids == model.expected_tokens([5, 6], 8)
    assert_clean(engine)


def test_a_duplicate_id_is_refused_while_the_first_runs_and_free_afterwards() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1], greedy())
    with pytest.raises(RequestError, match="'a'") as caught:
        engine.add_request("a", [2], greedy())
    assert caught.value.code == "duplicate_request_id"
    run(engine)
    engine.add_request("a", [2], greedy())
    run(engine)


def test_a_full_queue_refuses() -> None:
    engine, _ = make_engine(max_waiting_requests=2)
    engine.add_request("a", [1], greedy())
    engine.add_request("b", [1], greedy())
    with pytest.raises(RequestError, match="max_waiting_requests=2") as caught:
        engine.add_request("c", [1], greedy())
    assert caught.value.code == "queue_full"
    run(engine)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "empty_prompt"),
        ("", "empty_prompt"),
        ({"prompt_token_ids": []}, "empty_prompt"),
        ([1, -1], "token_id_out_of_range"),
        ([1, FAKE_VOCAB], "token_id_out_of_range"),
        ([1] * 40, "context_length_exceeded"),
        ([1, 2.0], "invalid_request"),
        ([True], "invalid_request"),
        ([[1]], "invalid_request"),
        (None, "invalid_request"),
        ({"text": "x"}, "invalid_request"),
        ({"prompt_token_ids": "12"}, "invalid_request"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_kept(prompt: Any, code: str) -> None:
    engine, _ = make_engine(max_model_len=40)
    with pytest.raises(RequestError) as caught:
        engine.add_request("bad", prompt, greedy())
    assert caught.value.code == code
    assert_clean(engine)


@pytest.mark.parametrize(
    "params",
    [
        {"n": 10**6, "temperature": 1.0},
        {"best_of": 10**6, "temperature": 1.0},
        {"logprobs": 10**6},
        {"prompt_logprobs": -1},
        {"stop_token_ids": [FAKE_VOCAB]},
        {"allowed_token_ids": [0, 10**9]},
        {"logit_bias": {FAKE_VOCAB: 1.0}},
    ],
)
def test_parameters_beyond_model_or_caps_are_refused_before_anything_is_kept(params: dict[str, Any]) -> None:
    engine, _ = make_engine(max_logprobs=5)
    with pytest.raises(ParamsError):
        engine.add_request("bad", [1, 2], greedy(**params))
    assert_clean(engine)


def test_a_request_that_can_never_fit_the_cache_is_refused_and_others_go_on() -> None:
    engine, model = make_engine(num_blocks=10, max_num_seqs=8, max_model_len=40, plugins=[SamplerPlugin(TreeSampler())])
    with pytest.raises(RequestError, match="KV blocks") as caught:
        engine.add_request("huge", [1] * 20, TreeParams(width=4, max_tokens=20))
    assert caught.value.code == "kv_cache_too_small"
    with pytest.raises(RequestError, match="max_num_seqs"):
        engine.add_request("wide", [1], TreeParams(width=9, max_tokens=1))
    engine.add_request("fits", [1] * 20, greedy(max_tokens=20))
    assert run(engine)["fits"].outputs[0].token_ids == model.expected_tokens([1] * 20, 20)


def test_max_tokens_none_goes_on_to_the_models_length() -> None:
    engine, _ = make_engine(max_model_len=24)
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=None, ignore_eos=True))
    output = run(engine)["a"].outputs[0]
    assert len(output.token_ids) == 21
    assert output.finish_reason == "length"


def test_the_models_eos_ends_a_request_unless_ignored() -> None:
    engine, model = make_engine()
    prompt = next([a, b] for a in range(60) for b in range(60) if len(model.expected_tokens([a, b], 12)) not in (1, 12))
    expected = model.expected_tokens(prompt, 12)
    engine.add_request("stops", prompt, greedy(max_tokens=12))
    engine.add_request("goes on", prompt, greedy(max_tokens=12, ignore_eos=True))
    final = run(engine)
    assert final["stops"].outputs[0].token_ids == expected
    assert final["stops"].outputs[0].finish_reason == "stop"
    assert final["stops"].outputs[0].stop_reason is None
    assert len(final["goes on"].outputs[0].token_ids) == 12
    assert final["goes on"].outputs[0].finish_reason == "length"


def test_a_stop_token_ends_with_its_id_as_the_reason() -> None:
    engine, model = make_engine()
    expected = model.expected_tokens([7, 7], 8)
    stop = expected[3]
    cut = expected[: expected.index(stop) + 1]
    engine.add_request("a", [7, 7], greedy(stop_token_ids=[stop]))
    output = run(engine)["a"].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (cut, "stop", stop)


def test_min_tokens_holds_every_stop_back() -> None:
    engine, model = make_engine()
    stop = model.expected_tokens([7, 7], 8)[0]
    engine.add_request("a", [7, 7], greedy(stop_token_ids=[stop], min_tokens=4))
    output = run(engine)["a"].outputs[0]
    assert len(output.token_ids) >= 4
    assert stop not in output.token_ids[:4]


@pytest.mark.parametrize("chunk", [64, 5])
def test_logprobs_are_the_models_own(chunk: int) -> None:
    engine, model = make_engine(max_num_batched_tokens=chunk, max_num_seqs=4, max_model_len=64)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    engine.add_request("a", prompt, greedy(logprobs=2, prompt_logprobs=1, repetition_penalty=1.5, max_tokens=5))
    output = run(engine)["a"]
    tokens = list(prompt)
    total = 0.0
    for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        reference = model.logits_after(tokens).log_softmax(-1)
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(reference[token].item(), abs=1e-5)
        assert entry[token].rank == int((reference > reference[token]).sum()) + 1
        assert set(entry) == {token, *reference.topk(2).indices.tolist()}
        total += entry[token].logprob
        tokens.append(token)
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for place, entry in enumerate(output.prompt_logprobs[1:], start=1):
        reference = model.logits_after(prompt[:place]).log_softmax(-1)
        assert entry[prompt[place]].logprob == pytest.approx(reference[prompt[place]].item(), abs=1e-5)


def test_prompt_logprobs_are_complete_after_a_preemption_amid_the_prompt() -> None:
    engine, model = make_engine(num_blocks=12, max_num_batched_tokens=6, max_num_seqs=4, max_model_len=44)
    engine.add_request("first", [1, 2, 3, 4], greedy(max_tokens=36, ignore_eos=True))
    engine.add_request("second", list(range(1, 31)), greedy(max_tokens=8, prompt_logprobs=0))
    final = run(engine)
    assert final["second"].metrics.num_preemptions >= 1
    assert len(final["second"].prompt_logprobs) == 30
    reference = model.logits_after(range(1, 30)).log_softmax(-1)
    assert final["second"].prompt_logprobs[29][30].logprob == pytest.approx(reference[30].item(), abs=1e-5)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_streamed_outputs_add_up_to_the_final_one(kind: RequestOutputKind) -> None:
    engine, model = make_engine()
    engine.add_request("a", "hello", greedy(max_tokens=9, output_kind=kind, logprobs=0, ignore_eos=True, stop="zzz"))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    completions = [output.outputs[0] for output in outputs]
    reference, _ = make_engine(model)
    reference.add_request("a", "hello", greedy(max_tokens=9, ignore_eos=True))
    whole = run(reference)["a"].outputs[0]
    if kind is RequestOutputKind.DELTA:
        assert len(outputs) == 9
        assert "".join(c.text for c in completions) == whole.text
        assert [t for c in completions for t in c.token_ids] == whole.token_ids
        assert sum(len(c.logprobs) for c in completions) == 9
    else:
        assert len(outputs) == (1 if kind is RequestOutputKind.FINAL_ONLY else 9)
        assert all(whole.text.startswith(c.text) for c in completions)
        assert (completions[-1].text, completions[-1].token_ids) == (whole.text, whole.token_ids)


def test_the_same_seed_gives_the_same_tokens_alone_in_any_batch_and_any_order() -> None:
    cases = [
        ([i, i + 1], SamplingParams(seed=seed, temperature=1.5, top_p=p, max_tokens=10, ignore_eos=True))
        for i, (seed, p) in enumerate([(1, 1.0), (1, 0.9), (2, 1.0), (3, 0.5), (4, 1.0), (5, 0.95)])
    ]
    alone = []
    for prompt, params in cases:
        engine, _ = make_engine()
        engine.add_request("a", prompt, params)
        alone.append(run(engine)["a"].outputs[0].token_ids)
    for trial in range(6):
        order = random.Random(trial).sample(range(6), 6)
        engine, _ = make_engine(num_blocks=9, max_num_seqs=trial % 4 + 2, max_num_batched_tokens=6, max_model_len=36)
        for place in order:
            engine.add_request(str(place), *cases[place])
        final = run(engine)
        assert [final[str(place)].outputs[0].token_ids for place in range(6)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_requests_without_a_seed_differ_and_the_engines_seed_fixes_them() -> None:
    def sample(seed: int) -> list[list[int]]:
        engine, _ = make_engine(seed=seed)
        for i in range(3):
            engine.add_request(str(i), [1, 2], SamplingParams(temperature=2.0, max_tokens=8, ignore_eos=True))
        final = run(engine)
        return [final[str(i)].outputs[0].token_ids for i in range(3)]

    first = sample(0)
    assert first == sample(0)
    assert first != sample(1)
    assert first[0] != first[1]


def test_the_loop_calls_no_hook() -> None:
    """After construction every pluggy hook is poisoned; 100 steps with every kind of request must not notice."""
    from folo_core.plugins import manager

    registries = []
    original = manager.load_registry

    def keep(**options: Any) -> Any:
        registries.append(original(**options))
        return registries[-1]

    from folo_core.testing import fakes

    fakes.load_registry, before = keep, fakes.load_registry
    try:
        engine, _ = make_engine(plugins=[SamplerPlugin(TreeSampler()), ObserverPlugin()], max_model_len=256)
    finally:
        fakes.load_registry = before

    class Poison:
        def __getattr__(self, name: str) -> Any:
            message = f"hook {name} was called in the loop"
            raise AssertionError(message)

    registries[0].plugin_manager.hook = Poison()
    registries[0].plugin_manager._inner_hookexec = Poison()
    steps = 0
    engine.add_request("long", [1], greedy(max_tokens=110, ignore_eos=True))
    while engine.has_unfinished_requests:
        if steps % 10 == 0:
            engine.add_request(f"g{steps}", [1, 2], greedy(max_tokens=4, logprobs=1, prompt_logprobs=1, stop="q"))
            engine.add_request(f"r{steps}", [1, 2], SamplingParams(max_tokens=4, top_k=5, presence_penalty=1.0))
            engine.add_request(f"t{steps}", [1, 2], TreeParams(max_tokens=4))
            engine.abort(f"t{steps - 10}")
        engine.step()
        steps += 1
    assert steps >= 100


def test_metrics_follow_a_request() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request("a", [1], greedy(max_tokens=5, ignore_eos=True))
    engine.add_request("b", [1], greedy(max_tokens=5, ignore_eos=True))
    final = run(engine)
    for output in final.values():
        metrics = output.metrics
        moments = [
            metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time,
            metrics.last_token_time, metrics.finished_time,
        ]  # fmt: skip
        assert moments == sorted(moments)
        assert metrics.num_generated_tokens == 5
        assert metrics.inter_token_latency >= 0
    assert final["b"].metrics.queue_time > final["a"].metrics.queue_time


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted and finish in any order over a pool that is always too small."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FakeModel()
        self.sampler = TreeSampler()
        self.engine = Engine(
            fake_components(
                self.model, num_blocks=24, max_num_seqs=6, max_num_batched_tokens=9, max_model_len=32,
                plugins=[SamplerPlugin(self.sampler)],
            )
        )  # fmt: skip
        self.seen = watch_pasts(self.model)
        self.count = 0
        self.prompts: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 60), min_size=1, max_size=18), count=st.integers(1, 12), width=st.integers(0, 3)
    )
    def add(self, prompt: list[int], count: int, width: int) -> None:
        name = str(self.count)
        self.count += 1
        if width == 0:
            self.engine.add_request(name, prompt, greedy(max_tokens=count))
            self.prompts[name] = prompt
        else:
            self.engine.add_request(name, prompt, TreeParams(width=width, max_tokens=count, temperature=0.0))

    @rule()
    def step(self) -> None:
        live = [list(s.data.token_ids) for r in self.engine.requests.values() for s in r.live]
        limits = {name: r.params.max_tokens for name, r in self.engine.requests.items()}
        self.seen.clear()
        for output in self.engine.step():
            if output.finished:
                assert output.request_id not in self.ended
                self.ended.add(output.request_id)
                if output.request_id in self.prompts:
                    expected = self.model.expected_tokens(self.prompts[output.request_id], limits[output.request_id])
                    assert output.outputs[0].token_ids == expected
        assert all(past in live for past in self.seen)

    @precondition(lambda self: self.engine.requests)
    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick: int) -> None:
        name = list(self.engine.requests)[pick % len(self.engine.requests)]
        self.engine.abort(name)
        self.ended.add(name)

    @invariant()
    def books_balance(self) -> None:
        self.engine.check_integrity()
        assert self.engine.state.num_running_seqs <= 6

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        state = self.engine.state
        running = {r.request_id for r in state.running}
        waiting = {r.request_id for r in state.waiting}
        assert not running & waiting
        assert running | waiting == set(self.engine.requests)
        assert self.sampler.open <= set(self.engine.requests)

    def teardown(self) -> None:
        run(self.engine)
        assert_clean(self.engine)


TestEngineMachine = pytest.mark.slow(EngineMachine.TestCase)
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_a_fake_models_rows_are_really_read_from_blocks() -> None:
    """The oracle can fail: a copy that is left out is noticed."""
    engine, model = make_engine(plugins=[SamplerPlugin(TreeSampler())], max_model_len=40)
    model_backend = engine.executor.runner.backend
    model_backend.copy_blocks = lambda sources, destinations: None
    engine.add_request("a", [1, 2], TreeParams(width=4, max_tokens=12, ignore_eos=True, temperature=0.0))
    final = run(engine)
    assert final["a"].outputs[0].finish_reason == "error"
    assert "nobody wrote" in str(final["a"].error)
    assert torch.is_tensor(model.table)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("blocks", [10, 60])
def test_steps_in_flight_change_no_token(depth: int, blocks: int) -> None:
    executor = DeferredExecutor(depth)
    engine, model = make_engine(
        plugins=[executor],
        executor="deferred",
        num_blocks=blocks,
        max_num_batched_tokens=6,
        max_num_seqs=6,
        max_model_len=40,
    )
    rng = random.Random(0)
    prompts = {str(i): [rng.randrange(60) for _ in range(rng.randint(1, 20))] for i in range(12)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(max_tokens=18))
    engine.add_request("gone", [1] * 12, greedy(max_tokens=18))
    for _ in range(4):
        engine.step()
    engine.abort("gone")
    engine.add_request("gone", [2] * 9, greedy(max_tokens=5))
    final = run(engine)
    assert executor.most_in_flight == depth
    assert blocks == 60 or sum(output.metrics.num_preemptions for output in final.values()) >= 3
    for name, prompt in prompts.items():
        assert final[name].outputs[0].token_ids == model.expected_tokens(prompt, 18)
    assert final["gone"].outputs[0].token_ids == model.expected_tokens([2] * 9, 5)
    assert_clean(engine)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_backend_gets_metadata_on_the_device_if_it_asks(*, wanted: bool) -> None:
    engine, _ = make_engine()
    backend = engine.executor.runner.backend
    backend.wants_device_metadata = wanted
    plans = []
    backend.plan = plans.append
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=4, ignore_eos=True))
    run(engine)
    assert plans
    for plan in plans:
        tensors = (plan.query_start_device, plan.seq_lens_device, plan.block_tables_device)
        if wanted:
            arrays = (plan.query_start, plan.seq_lens, plan.block_tables)
            assert all(t.tolist() == a.tolist() for t, a in zip(tensors, arrays, strict=True))
        else:
            assert tensors == (None, None, None)
