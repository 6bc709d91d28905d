"""Beam search in the engine, around a model without weights: exact, isolated, atomic and cheap in memory."""

from __future__ import annotations

import pytest
import torch
from folo_beam_references import diverse_search

from engines import assert_clean, greedy, make_engine, run
from folo_beam import BeamParams
from folo_core import SamplingParams
from folo_core.errors import FoloError
from folo_core.sequence import SequenceStatus

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]


def search(params, prompts=PROMPTS, *, model=None, **options):
    """Answer every prompt in one engine; returns the outputs in order, and the engine."""
    engine, model = make_engine(model, **options)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params[number] if isinstance(params, list) else params)
    found = run(engine)
    assert_clean(engine)
    return [found[str(number)] for number in range(len(prompts))], engine


def answers(outputs):
    return [[(tuple(c.token_ids), c.finish_reason) for c in output.outputs] for output in outputs]


def likely_end(model):
    """Have the end-of-sequence token among the likely ones now and then."""
    model.table[::3, model.info.eos_token_ids[0]] += 3.0
    return model


@pytest.mark.parametrize(
    ("width", "groups", "strength"), [(4, 1, 0.0), (4, 2, 0.7), (6, 3, 1.5), (4, 4, 0.3), (6, 2, 9.0)]
)
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_equals_the_reference_written_from_the_paper(width, groups, strength, penalty):
    params = BeamParams(
        width=width, num_groups=groups, diversity_penalty=strength, n=width, length_penalty=penalty, max_tokens=9
    )
    model = likely_end(make_engine()[1])
    outputs, _ = search(params, model=model)
    ended = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = diverse_search(
            model, prompt, width=width, groups=groups, strength=strength, max_tokens=9, penalty=penalty
        )
        assert [tuple(c.token_ids) for c in output.outputs] == [tokens for tokens, _ in expected]
        assert [c.score for c in output.outputs] == pytest.approx([score for _, score in expected], abs=1e-5)
        ended += sum(c.finish_reason == "stop" for c in output.outputs)
    assert ended >= 3


def test_groups_make_answers_more_diverse():
    plain, _ = search(BeamParams(width=6, n=6, max_tokens=8))
    diverse, _ = search(BeamParams(width=6, n=6, max_tokens=8, num_groups=3, diversity_penalty=5.0))

    def firsts(outputs):
        return sum(len({c.token_ids[0] for c in output.outputs}) for output in outputs)

    assert firsts(diverse) > firsts(plain)


def test_widths_groups_and_phrases_share_steps_with_other_samplers_bit_for_bit():
    params = [
        BeamParams(width=2, n=2, max_tokens=10),
        SamplingParams(temperature=0.9, seed=3, max_tokens=10),
        BeamParams(width=5, n=5, max_tokens=7, early_stopping="never"),
        greedy(max_tokens=10),
        BeamParams(width=4, n=4, max_tokens=10, num_groups=2, diversity_penalty=0.5, stop_token_ids=[5, 9]),
        BeamParams(width=2, n=2, max_tokens=12, length_penalty=0.0),
        BeamParams(width=3, n=3, max_tokens=10, must_include=[[20, 21]]),
    ]
    prompts = [*PROMPTS, [20], [21, 22]]
    model = likely_end(make_engine()[1])
    together, _ = search(params, prompts, model=model, max_num_seqs=32)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (alone,), _ = search(one, [prompt], model=model)
        assert answers([alone]) == answers([output])
        assert [c.score for c in alone.outputs] == [c.score for c in output.outputs]


def test_preemption_takes_all_of_a_search_and_changes_nothing():
    params = [BeamParams(width=w, n=w, max_tokens=14, early_stopping="never") for w in (4, 2, 3, 4, 6)]
    params[3] = BeamParams(width=4, n=4, max_tokens=14, num_groups=2, diversity_penalty=0.5)
    prompts = [*PROMPTS, [20, 21, 22], [23]]
    mixed = [*params, greedy(max_tokens=14), SamplingParams(seed=1, max_tokens=14)]
    model = likely_end(make_engine()[1])
    roomy, _ = search(mixed, prompts, model=model, max_num_seqs=32)
    assert not any(output.metrics.num_preemptions for output in roomy)
    tight, _ = search(mixed, prompts, model=model, max_num_seqs=32, num_blocks=28, max_num_batched_tokens=32)
    assert sum(output.metrics.num_preemptions for output in tight[:5]) >= 2
    assert answers(tight) == answers(roomy)
    assert [[c.score for c in o.outputs] for o in tight] == [[c.score for c in o.outputs] for o in roomy]


def test_a_width_that_fills_the_engine_may_end_and_fork_rows_in_one_step():
    stops = list(range(14, 63))
    params = BeamParams(width=4, n=4, max_tokens=30, early_stopping="never", length_penalty=2.0, stop_token_ids=stops)
    outputs, _ = search(params, max_num_seqs=4)
    assert all(output.error is None and len(output.outputs) == 4 for output in outputs)
    assert any(len(c.token_ids) > 2 for output in outputs for c in output.outputs), "some rows went on beside the ends"


def test_abort_midway_returns_every_block_and_leaves_the_others_alone():
    params = BeamParams(width=4, n=4, max_tokens=12)
    expected, _ = search(params, PROMPTS[:2])
    engine, _ = make_engine()
    for name, prompt in (("0", PROMPTS[0]), ("gone", PROMPTS[2]), ("1", PROMPTS[1])):
        engine.add_request(name, prompt, params)
    for _ in range(5):
        engine.step()
    assert len(engine.requests["gone"].live) == 4
    (aborted,) = engine.abort("gone")
    assert {c.finish_reason for c in aborted.outputs if c.finish_reason != "stop"} == {"abort"}
    found = run(engine)
    assert answers([found["0"], found["1"]]) == answers(expected)
    assert_clean(engine)
    assert not engine.executor.runner.stage.samplers["folo-beam:beam"].part._searches


def test_a_nan_row_ends_its_own_search_only():
    params = BeamParams(width=3, n=3, max_tokens=8)
    expected, _ = search(params)
    engine, model = make_engine()

    def poison(logits, pasts):
        for row, past in enumerate(pasts):
            if past[: len(PROMPTS[1])] == PROMPTS[1] and len(past) > 4:
                logits[row, 0] = torch.nan
        return logits

    model.edit_logits = poison
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, params)
    found = run(engine)
    assert "nan" in str(found["1"].error)
    others = [number for number in range(len(PROMPTS)) if number != 1]
    assert answers([found[str(n)] for n in others]) == answers([expected[n] for n in others])
    assert_clean(engine)


def test_history_is_shared_and_only_partial_tails_are_copied():
    engine, _ = make_engine(block_size=4)
    prompt = list(range(1, 14))  # three full blocks and a token
    engine.add_request("r", prompt, BeamParams(width=6, n=6, max_tokens=24, ignore_eos=True))
    request, submit, copies = engine.requests["r"], engine.executor.submit, []

    def watch(scheduled):
        if not request.live:
            return submit(scheduled)
        lengths = {s.num_computed_tokens - 1 for s in request.live if s.block_table is not None}
        rows = [s.block_table.blocks for s in request.live if s.block_table is not None]
        shared = {tuple(blocks[:3]) for blocks in rows}
        assert len(shared) == 1, "all rows read the same prompt blocks"
        assert not {*scheduled.copy_sources} & {*next(iter(shared))}, "and nobody copies them"
        assert len(scheduled.copy_sources) <= len(request.live)
        assert len(lengths) == 1
        copies.append((lengths.pop(), len(scheduled.copy_sources)))
        return submit(scheduled)

    engine.executor.submit = watch
    run(engine)
    decodes = copies[1:]
    assert len(decodes) == 23
    assert all(count == 0 for length, count in decodes if length % 4 == 0), "a full tail is shared, not copied"
    assert sum(count for _, count in decodes) >= 10
    assert max(count for _, count in decodes) <= 5, "one of those that share a tail keeps it"
    assert_clean(engine)


def test_answers_and_scores_are_those_asked_for():
    model = likely_end(make_engine()[1])
    every, _ = search(BeamParams(width=5, n=5, max_tokens=10), model=model)
    for options in ({"n": 2}, {"num_return_sequences": 2}, {"n": 2, "num_return_sequences": 2}):
        two, _ = search(BeamParams(width=5, max_tokens=10, **options), model=model)
        assert answers(two) == [found[:2] for found in answers(every)]
    one, _ = search(BeamParams(width=5, max_tokens=10), model=model)
    assert answers(one) == [found[:1] for found in answers(every)]
    for output in every:
        assert [c.score for c in output.outputs] == sorted((c.score for c in output.outputs), reverse=True)
        for c in output.outputs:
            assert c.cumulative_logprob / len(c.token_ids) == pytest.approx(c.score, abs=1e-5)


def test_log_probabilities_are_the_models():
    outputs, _ = search(BeamParams(width=4, n=4, max_tokens=8, logprobs=2))
    for output in outputs:
        for c in output.outputs:
            chosen = [entries[token].logprob for token, entries in zip(c.token_ids, c.logprobs, strict=True)]
            assert sum(chosen) == pytest.approx(c.cumulative_logprob)
            assert sum(chosen) / len(chosen) == pytest.approx(c.score, abs=1e-5)


def test_a_stop_string_ends_a_hypothesis_and_the_search_grows_back():
    model = make_engine()[1]
    free, _ = search(BeamParams(width=4, n=4, max_tokens=10), model=model)
    stop = free[0].outputs[0].text[3:5]
    (output, *_), _ = search(BeamParams(width=4, n=4, max_tokens=10, stop=[stop]), model=model)
    stopped = [c for c in output.outputs if c.stop_reason == stop]
    assert stopped
    assert len(output.outputs) == 4
    assert all(stop not in c.text for c in output.outputs)


def test_min_tokens_and_ignore_eos_hold():
    model = likely_end(make_engine()[1])
    outputs, _ = search(BeamParams(width=4, n=4, max_tokens=10, min_tokens=6, stop_token_ids=[1, 2]), model=model)
    assert min(len(c.token_ids) for output in outputs for c in output.outputs) >= 6
    outputs, _ = search(BeamParams(width=4, n=4, max_tokens=10, ignore_eos=True), model=model)
    assert {len(c.token_ids) for output in outputs for c in output.outputs} == {10}


def test_early_stopping_saves_steps():
    model = likely_end(make_engine()[1])

    def steps(early):
        params = BeamParams(width=4, max_tokens=24, early_stopping=early)
        return [search(params, [prompt], model=model)[1].step_count for prompt in PROMPTS]

    at_once, when_hopeless, never = map(steps, (True, False, "never"))
    assert all(a <= b <= c for a, b, c in zip(at_once, when_hopeless, never, strict=True))
    assert sum(at_once) < sum(when_hopeless) < sum(never)


def test_nothing_is_streamed_before_the_end_of_a_search():
    engine, _ = make_engine()
    engine.add_request("r", PROMPTS[0], BeamParams(width=3, max_tokens=6, output_kind="DELTA", ignore_eos=True))
    seen = [output for _ in range(10) for output in engine.step()]
    assert [output.finished for output in seen] == [True]
    assert len(seen[0].outputs[0].token_ids) == 6


def test_width_beyond_the_engines_places_is_refused():
    engine, _ = make_engine(max_num_seqs=4)
    with pytest.raises(FoloError, match="max_num_seqs=4"):
        engine.add_request("r", PROMPTS[0], BeamParams(width=5))
    assert_clean(engine)


def test_a_fork_of_a_beam_searches_anew():
    engine, _ = make_engine()
    engine.add_request("r", PROMPTS[0], BeamParams(width=3, n=3, max_tokens=12, ignore_eos=True))
    for _ in range(4):
        engine.step()
    kept = engine.requests["r"].live[0].data.output_token_ids.copy()
    engine.fork("r", "s", row=0)
    found = run(engine)
    assert all(c.token_ids[: len(kept)] == kept for c in found["s"].outputs)
    assert len(found["s"].outputs) == 3
    assert_clean(engine)
    assert SequenceStatus.FINISHED_LENGTH_CAPPED.finish_reason == found["s"].outputs[0].finish_reason
