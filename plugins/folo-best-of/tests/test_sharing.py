"""Candidates in an engine: they share the prompt's blocks, survive preemption and leave their neighbours alone."""

from __future__ import annotations

import attrs
import pytest
import torch

from engines import SamplerPlugin, TreeParams, assert_clean, make_engine, run, watch_pasts
from folo_best_of import BestOfParams
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingParams
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel

PROMPT = [5, 9, 2, 7, 1, 8, 3, 4, 6, 2]
WIDE = SamplingParams(n=5, seed=11, max_tokens=14, ignore_eos=True)


def answers(output) -> list[tuple]:
    return [(a.token_ids, a.text, a.score, a.cumulative_logprob, a.finish_reason) for a in output.outputs]


def used(engine) -> int:
    pool = engine.state.kv.pool
    return pool.num_usable - pool.num_free


def peak_blocks(engine) -> int:
    """Run to the end and return the most blocks held after any step."""
    most = 0
    while engine.has_unfinished_requests:
        engine.step()
        most = max(most, used(engine))
    return most


def expected_answers(params, prompt=PROMPT) -> list[tuple]:
    engine, _ = make_engine()
    engine.add_request("a", prompt, params)
    return answers(run(engine)["a"])


def test_the_prompt_is_run_once_and_its_blocks_are_held_once():
    engine, model = make_engine(block_size=4)
    ran = []
    model.before_forward = lambda ids: ran.append(len(ids))
    engine.add_request("a", PROMPT, WIDE)
    request = engine.requests["a"]
    engine.step()
    assert [sequence.index for sequence in request.live] == [0, 1, 2, 3, 4]
    assert used(engine) == 3, "right after the fan-out even the partial block is shared"
    for step in range(2, 15):
        engine.step()
        engine.check_integrity()
        if not request.live:
            break
        tables = [sequence.block_table.blocks for sequence in request.live]
        assert len({tuple(blocks[:2]) for blocks in tables}) == 1, "the two full blocks of the prompt"
        tails = [block for blocks in tables for block in blocks[2:]]
        assert len(set(tails)) == len(tails), "what candidates write is their own"
        computed = len(PROMPT) + step - 1
        assert used(engine) == 2 + 5 * (-(-computed // 4) - 2)
    assert ran == [len(PROMPT)] + [5] * 13
    assert_clean(engine)


def test_a_prompt_in_chunks_fans_out_when_it_is_complete():
    engine, model = make_engine(max_num_batched_tokens=4, max_num_seqs=4)
    ran = []
    model.before_forward = lambda ids: ran.append(len(ids))
    engine.add_request("a", PROMPT, attrs.evolve(WIDE, n=3))
    request = engine.requests["a"]
    widths = []
    while engine.has_unfinished_requests:
        final = engine.step()
        widths.append(len(request.live))
    assert ran[:4] == [4, 4, 2, 3]
    assert widths[:4] == [1, 1, 3, 3]
    assert answers(final[-1]) == expected_answers(attrs.evolve(WIDE, n=3))


def test_sixteen_candidates_hold_an_eighth_of_the_blocks_of_sixteen_requests():
    prompt = [(7 * i + 3) % (FAKE_VOCAB - 1) for i in range(1024)]
    options = {"block_size": 16, "num_blocks": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 16 * 1024}
    params = SamplingParams(max_tokens=64, ignore_eos=True, seed=1, detokenize=False)
    together, _ = make_engine(FakeModel(max_model_len=2048), **options)
    together.add_request("a", prompt, attrs.evolve(params, n=1, best_of=16))
    apart, _ = make_engine(FakeModel(max_model_len=2048), **options)
    for index in range(16):
        apart.add_request(f"{index}", prompt, attrs.evolve(params, seed=index))
    shared, separate = peak_blocks(together), peak_blocks(apart)
    assert (shared, separate) == (64 + 16 * 4, 16 * 68)
    assert 8 * shared <= separate
    assert_clean(together)
    assert_clean(apart)


@pytest.mark.parametrize("params", [WIDE, attrs.evolve(WIDE, n=2, best_of=5, ignore_eos=False)], ids=["n", "best_of"])
def test_preempted_candidates_go_on_as_if_nothing_had_happened(params):
    asked = {name: attrs.evolve(params, seed=seed) for seed, name in enumerate("abc")}
    engine, model = make_engine(num_blocks=40, max_num_seqs=15, max_model_len=40)
    pasts = watch_pasts(model)
    for name, own in asked.items():
        engine.add_request(name, PROMPT, own)
    metrics, wide_when_preempted = {name: r.metrics for name, r in engine.requests.items()}, 0
    schedule = engine.scheduler.schedule

    def watched(state, budget):
        nonlocal wide_when_preempted
        scheduled = schedule(state, budget)
        wide_when_preempted += any(len(request.live) > 1 for request in scheduled.preempted)
        return scheduled

    engine.scheduler.schedule = watched
    final = run(engine)
    assert sum(m.num_preemptions for m in metrics.values()) > 0
    assert wide_when_preempted > 0
    assert pasts
    for name, own in asked.items():
        assert answers(final[name]) == expected_answers(own)
    assert_clean(engine)


def test_a_request_preempted_before_its_first_token_fans_out_when_it_returns():
    long_prompt = [(3 * i + 1) % 60 for i in range(40)]
    engine, _ = make_engine(num_blocks=14, max_num_seqs=8, max_model_len=50, max_num_batched_tokens=8)
    for name in ("first", "second"):
        engine.add_request(name, PROMPT[:6], SamplingParams(seed=1, max_tokens=20, ignore_eos=True))
    engine.add_request("wide", long_prompt, SamplingParams(n=3, seed=4, max_tokens=4, ignore_eos=True))
    request = engine.requests["wide"]
    preempted_at = []
    while engine.has_unfinished_requests:
        before = request.metrics.num_preemptions
        for output in engine.step():
            if output.request_id == "wide" and output.finished:
                found = answers(output)
        if request.metrics.num_preemptions > before:
            preempted_at.append((len(request.live), len(request.live[0].data.output_token_ids)))
    assert (1, 0) in preempted_at
    params = SamplingParams(n=3, seed=4, max_tokens=4, ignore_eos=True)
    assert found == expected_answers(params, long_prompt)
    assert_clean(engine)


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_returns_every_block(steps):
    engine, _ = make_engine(max_num_batched_tokens=10, max_num_seqs=10)
    engine.add_request("a", PROMPT, WIDE)
    engine.add_request("b", PROMPT[:3], WIDE)
    for _ in range(steps):
        engine.step()
    (last,) = engine.abort("a")
    assert {answer.finish_reason for answer in last.outputs} == {"abort"}
    engine.check_integrity()
    assert answers(run(engine)["b"]) == expected_answers(WIDE, PROMPT[:3])
    assert_clean(engine)


@pytest.mark.parametrize("place", [0, 3])
def test_one_bad_row_ends_its_own_request_only(place):
    engine, model = make_engine()
    engine.add_request("bad", PROMPT, WIDE)
    engine.add_request("good", PROMPT[1:], WIDE)
    bad = engine.requests["bad"]

    def poison(logits, pasts):
        for row, past in enumerate(pasts):
            if past[0] == PROMPT[0] and len(past) == len(PROMPT) + place:
                logits[row] = torch.nan
                break
        return logits

    model.edit_logits = poison
    final = run(engine)
    assert final["bad"].error is not None
    assert len(bad.finished) == (5 if place else 1)
    assert answers(final["good"]) == expected_answers(WIDE, PROMPT[1:])
    assert_clean(engine)


class SecondBest:
    """A sampler of another plugin, which writes to its logits as it may: takes every row's second best token."""

    def add_request(self, request) -> None: ...

    def remove_request(self, request_id) -> None: ...

    def step(self, logits, metadata):
        logits.scatter_(1, logits.argmax(1, keepdim=True), -torch.inf)
        return SamplerOutput(parents=torch.arange(len(logits)), tokens=logits.argmax(1, keepdim=True))

    def finish(self, request):
        return list(request.finished)


def test_every_kind_of_neighbour_in_one_batch_gets_what_it_gets_alone():
    asked = {
        "greedy": SamplingParams(temperature=0, max_tokens=9, logprobs=1),
        "wide": SamplingParams(n=3, seed=1, max_tokens=12, logprobs=2),
        "random": SamplingParams(seed=2, top_p=0.9, max_tokens=10),
        "best": BestOfParams(n=1, best_of=4, length_penalty=1.0, seed=3, max_tokens=11),
        "other": TreeParams(max_tokens=8, width=1),
        "narrow": SamplingParams(n=1, best_of=2, top_k=4, seed=5, max_tokens=7, repetition_penalty=1.2),
    }

    def run_all(names) -> tuple[dict, dict]:
        engine, model = make_engine(plugins=[SamplerPlugin(SecondBest())], max_num_batched_tokens=64)
        rows = {}

        def note(logits, pasts):
            rows.update({tuple(past): row.clone() for past, row in zip(pasts, logits, strict=True)})
            return logits

        model.edit_logits = note
        for number, name in enumerate(asked):
            if name in names:
                engine.add_request(name, [number, *PROMPT], asked[name])
        final = {
            name: [(answers(output), [a.logprobs for a in output.outputs])] for name, output in run(engine).items()
        }
        assert_clean(engine)
        return final, rows

    together, rows = run_all(asked)
    assert all(together.values())
    for name in asked:
        alone, rows_alone = run_all([name])
        assert alone[name] == together[name]
        for past, row in rows_alone.items():
            assert torch.equal(row, rows[past])


def test_a_branch_of_a_candidate_fans_out_from_the_tokens_it_takes_over():
    params = SamplingParams(n=1, best_of=3, seed=8, max_tokens=12, ignore_eos=True)
    normalised = BestOfParams(n=4, length_penalty=1.0, seed=9, max_tokens=12, ignore_eos=True)
    engine, model = make_engine()
    engine.add_request("a", PROMPT, params)
    for _ in range(6):
        engine.step()
    source = engine.requests["a"].live[2]
    taken = source.data.output_token_ids[:4]
    engine.fork("a", "b", at=4, row=2, params=normalised)
    engine.fork("a", "c", at=4, row=2)
    branch, held = engine.requests["b"], used(engine)
    assert len(branch.live) == 1
    assert branch.live[0].tag == 0
    engine.step()
    assert len(branch.live) == 4
    assert {sequence.tag for sequence in branch.live} == {5}
    assert branch.live[0].block_table.blocks[:3] == source.block_table.blocks[:3]
    assert used(engine) < held + 8
    final = run(engine)
    assert len(final["c"].outputs) == 1
    for answer in final["b"].outputs:
        assert answer.token_ids[:4] == taken
        exact = 0.0
        for place in range(4, 12):
            logits = model.logits_after([*PROMPT, *answer.token_ids[:place]])
            exact += float(logits.log_softmax(0)[answer.token_ids[place]])
        assert answer.score == pytest.approx(exact / 8, rel=1e-5)
    assert final["b"].outputs == sorted(final["b"].outputs, key=lambda answer: -answer.score)
    assert answers(final["a"]) == expected_answers(params)
    assert_clean(engine)
