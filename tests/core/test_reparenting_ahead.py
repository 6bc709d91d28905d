"""Rows that continue one another before the host knows: beams that do not wait for it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engines import SamplerPlugin, assert_clean, greedy, make_engine, run
from searches import Beams, SearchParams

if TYPE_CHECKING:
    from folo_core.engine.engine import Engine

SMALL: dict[str, Any] = {"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 60}


def serve(engine: Engine, seed: int, count: int = 10) -> dict[str, Any]:
    """Run searches of several widths beside plain requests."""
    r = random.Random(seed)
    for number in range(count):
        prompt = [r.randrange(60) for _ in range(r.randint(1, 14))]
        if number % 3 == 2:
            params: Any = greedy(max_tokens=r.randint(1, 20), ignore_eos=True, repetition_penalty=r.choice([1.0, 1.3]))
        else:
            params = SearchParams(width=r.choice([1, 2, 3, 4]), max_tokens=r.randint(1, 30), ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    final = run(engine)
    assert not any(output.error for output in final.values())
    return {name: [(o.token_ids, o.text, o.score) for o in output.outputs] for name, output in final.items()}


def beams(engine_options: dict[str, Any], sampler: Beams, seed: int) -> dict[str, Any]:
    engine, _ = make_engine(plugins=[SamplerPlugin(sampler, SearchParams)], **engine_options)
    answers = serve(engine, seed)
    assert_clean(engine)
    return answers


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([40, 48, 200]),
    swap=st.sampled_from(["0", "256"]),
    prefixes=st.booleans(),
    dies=st.booleans(),
)
def test_searches_that_run_ahead_answer_as_in_step(seed, blocks, swap, prefixes, dies):
    options = SMALL | {"num_blocks": blocks, "swap_space": swap, "enable_prefix_caching": prefixes}
    expected = beams(options | {"run_ahead": False}, Beams(dies=dies), seed)
    assert beams(options | {"run_ahead": True}, Beams(dies=dies), seed) == expected


def test_rows_move_while_the_host_is_behind():
    sampler = Beams(dies=False)
    beams(SMALL | {"run_ahead": True}, sampler, seed=1)
    assert sampler.moved_ahead > 20
    assert sampler.ran_behind > 50


def test_a_search_that_narrows_is_computed_anew():
    sampler = Beams()
    options = SMALL | {"num_blocks": 200}
    expected = beams(options | {"run_ahead": False}, Beams(), seed=5)
    assert beams(options | {"run_ahead": True}, sampler, seed=5) == expected
    assert sampler.narrowed
