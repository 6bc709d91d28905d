"""On a CUDA device: steps that run ahead of the host, steps that are recorded, and a host that waits for little."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import ARCHITECTURES, save_model

from folo_beam import BeamParams
from folo_best_of import BestOfParams
from folo_core import LLM, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (nox -s gpu)"),
]


def open_llm(folder: Path, **options: Any) -> LLM:
    settings = {"skip_tokenizer_init": True, "num_blocks": 400, "max_model_len": 96, "max_num_batched_tokens": 64}
    return LLM(str(folder), **(settings | {"max_num_seqs": 24, "dtype": "float32"} | options))


def requests(count: int, **fields: Any) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters of all kinds that run ahead, of many lengths."""
    r = random.Random(4)
    prompts = [[r.randrange(3, 90) for _ in range(r.randint(1, 40))] for _ in range(count)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "seed": 1},
        {"temperature": 1.2, "top_p": 0.8, "seed": 2},
        {"temperature": 0.7, "min_p": 0.1, "seed": 3},
        {"temperature": 0.0, "stop_token_ids": list(range(5, 20)), "ignore_eos": True},
    ]
    return prompts, [
        SamplingParams(max_tokens=r.randint(1, 40), **(kinds[i % len(kinds)] | fields)) for i in range(count)
    ]


def answers(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(prompts, params)
    assert all(output.error is None for output in outputs)
    return [[(o.token_ids, o.finish_reason) for o in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, ARCHITECTURES["qwen3"]())
    return folder


@pytest.mark.parametrize("options", [{"run_ahead": False}, {"graphs": False}, {"run_ahead": False, "graphs": False}])
def test_neither_running_ahead_nor_graphs_change_an_answer(options: dict[str, bool], model: Path) -> None:
    given = requests(30)
    assert answers(open_llm(model), *given) == answers(open_llm(model, **options), *given)


def test_steps_run_ahead_and_are_replayed(model: Path) -> None:
    llm = open_llm(model)
    executor = llm.engine.executor
    graphs = executor.runner.graphs
    assert executor.max_steps_in_flight == 2
    assert graphs is not None
    assert sorted(graphs._recorded) == graphs.sizes, "all sizes are recorded before the first request"
    replayed = []
    replay = graphs.replay
    graphs.replay = lambda step: replayed.append(len(step.slots)) or replay(step)
    pending = []
    prompts, params = requests(9)
    for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        llm.engine.add_request(str(number), prompt, asked)
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
        pending += [s.num_pending for r in llm.engine.requests.values() for s in r.live]
    assert max(pending) == 1
    assert len(set(replayed)) > 3, "steps of several sizes were replayed"


def run_without_waiting(llm: LLM, steps: int) -> None:
    """Torch raises where the host would wait for the device; the event of an earlier step is no such place."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            llm.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_decode_step_waits_for_nothing_but_the_step_before_it(model: Path) -> None:
    llm = open_llm(model)
    for number, prompt in enumerate([[5, 6, 7], [8, 9], [3] * 20]):
        params = SamplingParams(temperature=0.8 * (number > 0), top_k=10, seed=number, max_tokens=60, ignore_eos=True)
        llm.engine.add_request(str(number), prompt, params)
    for _ in range(8):
        llm.engine.step()
    run_without_waiting(llm, 40)
    assert all(len(r.live[0].data.output_token_ids) > 30 for r in llm.engine.requests.values())
    llm.engine.abort(list(llm.engine.requests))


def test_beams_wait_for_nothing_but_the_step_before_them(model: Path) -> None:
    """Re-parenting included: who continues whom stays on the device until the next step has begun."""
    llm = open_llm(model)
    for number, prompt in enumerate([[5, 6, 7], [8, 9], [3] * 20]):
        llm.engine.add_request(str(number), prompt, BeamParams(width=3 + number, max_tokens=60, ignore_eos=True))
    for _ in range(8):
        llm.engine.step()
    before = [[s.block_table.blocks[-1] for s in r.live] for r in llm.engine.requests.values()]
    run_without_waiting(llm, 40)
    assert all(s.num_pending == 1 for r in llm.engine.requests.values() for s in r.live)
    assert before != [[s.block_table.blocks[-1] for s in r.live] for r in llm.engine.requests.values()]
    llm.engine.check_integrity()
    llm.engine.abort(list(llm.engine.requests))


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"enable_prefix_caching": True}], ids=str)
def test_beams_that_run_ahead_answer_as_in_step(options: dict[str, bool], block_size: int, model: Path) -> None:
    r = random.Random(block_size)
    prompts = [[r.randrange(3, 90) for _ in range(r.randint(4, 30))] for _ in range(12)]
    params: list[Any] = [
        BeamParams(
            width=r.choice([2, 3, 4, 7]),
            max_tokens=r.randint(2, 50),
            early_stopping=r.choice([True, False, "never"]),
            length_penalty=r.choice([0.5, 1.0, 2.0]),
            stop_token_ids=list(range(5, 5 + r.choice([0, 1, 3]))),
        )
        for _ in prompts
    ]
    shared = {"block_size": block_size, "num_blocks": 1600 // block_size} | options
    llm = open_llm(model, **shared)
    found = answers(llm, prompts, params)
    llm.engine.check_integrity()
    expected = answers(open_llm(model, run_ahead=False, **shared), prompts, params)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= len(prompts) - 1, "a last bit may part a tie"


def test_strategies_are_the_same_with_and_without_graphs(model: Path) -> None:
    r = random.Random(2)
    prompts = [[r.randrange(3, 90) for _ in range(r.randint(4, 30))] for _ in range(4)]
    params = [
        BeamParams(width=4, max_tokens=12, ignore_eos=True),
        BestOfParams(n=3, best_of=3, temperature=0.9, seed=5, max_tokens=20, ignore_eos=True),
        BeamParams(width=3, max_tokens=9),
        BestOfParams(n=2, best_of=4, temperature=0.9, seed=6, max_tokens=15),
    ]
    assert answers(open_llm(model), prompts, params) == answers(open_llm(model, graphs=False), prompts, params)


def test_prefix_hits_change_no_answer(model: Path) -> None:
    given = requests(12, seed=8)
    prompts = [[7] * 40 + prompt[:20] for prompt in given[0]]
    llm = open_llm(model, enable_prefix_caching=True)
    first = answers(llm, prompts, given[1])
    assert answers(llm, prompts, given[1]) == first
    assert llm.stats().prefix_cache.num_hit_tokens > 0
    assert first == answers(open_llm(model), prompts, given[1])
