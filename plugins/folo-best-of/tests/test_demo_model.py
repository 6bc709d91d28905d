"""Best-of end to end on the demo model: deterministic per seed, shared memory, and each answer one of its own."""

from __future__ import annotations

import attrs
import pytest

from folo_best_of import BestOfParams
from folo_core import LLM, SamplingParams

PROMPT = "The old lighthouse keeper looked out at the sea and"
WIDE = SamplingParams(n=4, seed=17, max_tokens=12, temperature=0.9, ignore_eos=True)


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256)


def tokens(output) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


@pytest.mark.slow
def test_four_answers_are_deterministic_per_seed_and_share_the_prompt(demo):
    engine = demo.engine
    engine.add_request("a", PROMPT, WIDE)
    request, most_shared, final = engine.requests["a"], 0, None
    full = len(request.prompt_token_ids) // engine.state.kv.block_size
    while engine.has_unfinished_requests:
        for output in engine.step():
            final = output if output.finished else final
        tables = [sequence.block_table.blocks for sequence in request.live if sequence.block_table is not None]
        if len(tables) == 4:
            assert len({tuple(blocks[:full]) for blocks in tables}) == 1
            most_shared = max(most_shared, sum(map(len, tables)) - len({block for table in tables for block in table}))
    assert most_shared >= 3
    assert engine.state.kv.pool.num_free == engine.state.kv.pool.num_usable
    assert len({tuple(answer) for answer in tokens(final)}) == 4
    scores = [answer.score for answer in final.outputs]
    assert scores == sorted(scores, reverse=True)
    again, other = demo.generate([PROMPT] * 2, [WIDE, attrs.evolve(WIDE, seed=18)])
    assert tokens(again) == tokens(final)
    assert tokens(other) != tokens(final)
    assert again.outputs[0].score == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.slow
def test_the_best_of_several_is_the_first_of_all_of_them(demo):
    fields = {"best_of": 4, "seed": 17, "max_tokens": 12, "temperature": 0.9}
    everything = demo.generate(PROMPT, BestOfParams(n=4, length_penalty=1.0, **fields))[0]
    two = demo.generate(PROMPT, BestOfParams(n=2, length_penalty=1.0, **fields))[0]
    assert tokens(two) == tokens(everything)[:2]
    for answer in everything.outputs:
        assert answer.score == pytest.approx(answer.cumulative_logprob / len(answer.token_ids), rel=1e-5)


@pytest.mark.slow
def test_the_first_candidate_is_the_single_answer(demo):
    engine = demo.engine
    engine.add_request("a", PROMPT, WIDE)
    request = engine.requests["a"]
    single = demo.generate(PROMPT, attrs.evolve(WIDE, n=1))[0]
    assert not engine.has_unfinished_requests
    first = next(sequence for sequence in request.finished if sequence.index == 0)
    assert first.data.output_token_ids == single.outputs[0].token_ids
