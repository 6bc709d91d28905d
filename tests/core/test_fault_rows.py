"""Faults and bad input, row by row. ``ROWS`` says which tests show that the engine survives which.

A test of a fault first shows that the fault reached the engine. Then the engine lives, a control request that ran
beside it got the tokens and log probabilities that it gets alone, bit by bit, and nothing of the other is left.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import itertools
import logging
import os
import random
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import (
    ObserverPlugin,
    SamplerPlugin,
    SchedulerPlugin,
    TreeParams,
    TreeSampler,
    assert_blocks_back,
    assert_clean,
    greedy,
    make_engine,
    make_llm,
    run,
)
from folo_core.engine import output_processor
from folo_core.engine.engine import STEPS_BEFORE_GROWTH, Engine
from folo_core.errors import ParamsError, RequestError, StepOutOfMemoryError
from folo_core.kv_cache import prefix_cache
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.request import Request
from folo_core.sampling_params import RequestOutputKind, SamplingParams
from folo_core.scheduling.planner import StepPlanner
from folo_core.testing.fakes import FAKE_VOCAB, FakeModel, FakeTokenizer

ROOT = Path(__file__).parents[2]
HERE = "tests/core/test_fault_rows.py"
ENGINE, FAULTS, OUTPUTS = (f"tests/core/test_{name}.py" for name in ("engine", "faults", "outputs"))
LOADING, FILES = "tests/core/test_plugins_loading.py", "tests/core/test_config_files.py"
HF, CLI = "plugins/folo-hf/tests/test_faults.py", "plugins/folo-cli/tests/test_cli.py"

ROWS: dict[int, tuple[str, list[str]]] = {
    1: (
        "empty prompt, token ids outside the vocabulary",
        [f"{ENGINE}::test_a_bad_prompt_is_refused_before_anything_is_kept",
         f"{HERE}::test_a_refused_prompt_leaves_its_neighbour_alone"],
    ),
    2: (
        "prompt >= model length, huge max_tokens",
        [f"{HERE}::test_a_prompt_as_long_as_the_model_is_refused_and_one_token_less_is_served",
         f"{HERE}::test_a_huge_max_tokens_ends_at_the_models_length"],
    ),
    3: (
        "what can never fit the memory",
        [f"{ENGINE}::test_a_request_that_can_never_fit_the_cache_is_refused_and_others_go_on",
         f"{HERE}::test_what_can_never_fit_is_refused_at_admission_and_the_queue_goes_on",
         f"{HERE}::test_a_group_that_takes_nearly_all_memory_comes_back_from_the_host"],
    ),
    4: (
        "collective exhaustion",
        [f"{HERE}::test_ten_times_the_memory_the_oldest_finishes_first_and_the_youngest_yields",
         f"{HERE}::test_a_scheduler_that_takes_memory_away_and_gives_it_back_is_named_with_its_victim",
         f"{FAULTS}::test_a_scheduler_that_never_schedules_is_named_and_nobody_waits_forever",
         f"{ENGINE}::test_memory_pressure_preempts_and_changes_no_token"],
    ),
    5: ("preempt-retry loops", [f"{HERE}::test_a_step_preempts_no_more_than_ran_and_nobody_twice"]),
    6: (
        "a million candidates, the whole vocabulary's log probabilities",
        [f"{HERE}::test_a_million_candidates_are_refused_before_anything_is_allocated",
         f"{HERE}::test_the_caps_are_configurable",
         f"{ENGINE}::test_parameters_beyond_model_or_caps_are_refused_before_anything_is_kept"],
    ),
    7: (
        "biased, stop and allowed tokens that are none",
        [f"{HERE}::test_tokens_that_are_none_are_refused_by_field_and_neighbours_are_bit_equal",
         "tests/core/test_sampling_params.py::test_every_field_refuses_what_does_not_fit"],
    ),
    8: (
        "NaN, inf, a row masked whole",
        [f"{FAULTS}::test_a_poisoned_logits_row_ends_its_own_request",
         f"{FAULTS}::test_a_fully_masked_row_ends_its_own_request",
         f"{FAULTS}::test_blocks_of_a_failed_request_are_zeroed_before_anyone_gets_them",
         f"{HERE}::test_blocks_of_a_failed_request_are_zeroed_although_the_step_that_should_fails"],
    ),
    9: (
        "stop strings across tokens, split characters",
        [f"{OUTPUTS}::test_a_stop_string_across_tokens_ends_the_text_before_it",
         f"{OUTPUTS}::test_a_stop_string_amid_a_multi_byte_character_is_found",
         f"{OUTPUTS}::test_an_unfinished_character_at_the_limit_is_shown_as_a_replacement",
         f"{OUTPUTS}::test_streams_of_a_mixed_batch_join_to_their_final_texts",
         f"{OUTPUTS}::test_detokenising_takes_linear_work",
         f"{HERE}::test_near_misses_of_stop_strings_take_linear_work"],
    ),
    10: (
        "abort in every state, and twice",
        [f"{HERE}::test_an_abort_in_any_state_returns_all_memory_within_two_steps",
         f"{HERE}::test_a_thousand_random_aborts_return_all_memory_within_two_steps",
         f"{ENGINE}::test_abort_at_any_time_returns_everything_and_twice_is_harmless",
         "plugins/folo-beam/tests/test_beam.py::test_abort_midway_returns_every_block_and_leaves_the_others_alone",
         "plugins/folo-best-of/tests/test_sharing.py::test_an_abort_returns_every_block"],
    ),
    11: ("a request id twice", [f"{ENGINE}::test_a_duplicate_id_is_refused_while_the_first_runs_and_free_afterwards"]),
    12: (
        "a plugin raises, hangs, returns wrong shapes",
        [f"{FAULTS}::test_a_faulty_processor_ends_only_the_requests_that_use_it",
         f"{FAULTS}::test_a_faulty_sampler_ends_only_its_own_requests",
         f"{FAULTS}::test_a_sampler_that_fails_to_rank_costs_the_order_but_not_the_answers",
         f"{FAULTS}::test_more_rows_than_were_reserved_end_their_request_alone",
         f"{FAULTS}::test_a_scheduler_that_raises_ends_the_requests_and_is_named",
         f"{FAULTS}::test_an_observer_that_raises_is_dropped_and_named",
         f"{FAULTS}::test_a_failing_forward_ends_the_requests_in_the_step_and_the_engine_lives",
         f"{FAULTS}::test_a_part_that_hangs_is_interrupted_and_named"],
    ),
    13: (
        "plugins that fail to import, clash, are of an old API",
        [f"{LOADING}::test_a_plugin_that_cannot_be_imported_is_named_and_isolated",
         f"{LOADING}::test_two_plugins_with_one_name_must_be_told_apart",
         f"{LOADING}::test_two_samplers_for_the_same_requests_clash_whatever_their_names",
         f"{LOADING}::test_a_wrong_hook_is_named_and_its_plugin_left_out_whole",
         f"{LOADING}::test_strict_mode_raises_every_problem_at_once"],
    ),
    14: (
        "out of memory in a step",
        [f"{HERE}::test_steps_shrink_until_they_fit_and_no_result_changes",
         f"{HERE}::test_a_budget_that_was_cut_grows_back",
         f"{HERE}::test_who_does_not_fit_the_smallest_step_ends_alone",
         f"{HERE}::test_out_of_memory_while_blocks_move_changes_no_result"],
    ),
    15: (
        "broken model folders",
        [f"{HF}::test_missing_path", f"{HF}::test_no_config", f"{HF}::test_corrupt_config",
         f"{HF}::test_unknown_architecture", f"{HF}::test_no_weights", f"{HF}::test_truncated_weights",
         f"{HF}::test_missing_shard", f"{HF}::test_weights_of_another_shape", f"{HF}::test_no_tokenizer",
         f"{HF}::test_code_of_an_unknown_architecture_is_refused", f"{HF}::test_tokenizer_code_is_refused",
         f"{HF}::test_pickled_weights_are_never_opened", f"{HF}::test_a_larger_tokenizer_grows_the_embeddings"],
    ),
    16: (
        "corrupt and newer config files, unknown fields",
        [f"{FILES}::test_a_file_cut_off_anywhere_is_refused_or_still_a_configuration",
         f"{FILES}::test_any_bytes_are_refused_or_a_configuration",
         f"{FILES}::test_a_newer_version_is_refused_with_the_mend",
         f"{FILES}::test_unknown_fields_have_suggestions",
         f"{FILES}::test_problems_of_all_layers_come_together"],
    ),
    17: (
        "Ctrl-C, a full disk, a broken pipe",
        [f"{HERE}::test_ctrl_c_in_generate_leaves_the_llm_usable_and_an_open_stream_whole",
         "tests/core/test_llm.py::test_a_stream_loses_nothing_while_others_are_generated",
         "tests/core/test_llm.py::test_ctrl_c_aborts_what_was_running_and_the_next_call_works",
         f"{FAULTS}::test_ctrl_c_in_a_step_leaves_an_engine_that_can_go_on",
         f"{FAULTS}::test_ctrl_c_before_a_step_runs_still_lets_a_failed_requests_blocks_be_zeroed",
         f"{CLI}::test_ctrl_c_keeps_what_was_written_and_exits_with_130",
         f"{CLI}::test_ctrl_c_keeps_the_lines_that_were_finished",
         f"{CLI}::test_a_full_disk_exits_with_1_and_says_so",
         f"{CLI}::test_a_disk_that_fills_up_keeps_the_lines_that_were_written",
         f"{CLI}::test_a_broken_pipe_exits_with_141_and_what_was_read_is_whole"],
    ),
    19: (
        "the prefix cache across tenants",
        [f"{HERE}::test_a_tenant_finds_its_own_beginnings_and_never_anothers",
         f"{HERE}::test_a_salt_does_not_stand_for_a_tenant",
         f"{HERE}::test_no_block_is_ever_shared_across_tenants",
         f"{HERE}::test_with_a_hash_that_collides_tokens_decide"],
    ),
}  # fmt: skip
"""Row to what it is about and the tests that show it. Rows 18 and 20 are the server's and the chat templates'."""


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_row_has_its_tests() -> None:
    assert set(ROWS) == {*range(1, 18), 19}
    assert all(names for _, names in ROWS.values())


@pytest.mark.parametrize("name", sorted({name for _, names in ROWS.values() for name in names}))
def test_a_test_that_a_row_names_exists(name: str) -> None:
    path, _, function = name.partition("::")
    assert function.startswith("test_")
    assert function in functions_of(path)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Each step that runs out of memory says so."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


CONTROL = [4, 5, 6]
CONTROL_PARAMS = greedy(max_tokens=12, logprobs=3, ignore_eos=True)
SWAP = str(64 * 32)
"""Room for 64 blocks of 4 tokens of 8 bytes on the host."""


@cache
def control_alone() -> tuple[list[int], list[Any]]:
    engine, _ = make_engine()
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    answer = run(engine)["control"].outputs[0]
    return answer.token_ids, answer.logprobs


def assert_control_unharmed(final: dict[str, Any]) -> None:
    answer = final["control"].outputs[0]
    assert answer.finish_reason == "length"
    assert (answer.token_ids, answer.logprobs) == control_alone(), "bit-equal"


def dense(model: FakeModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without any memory, past the end of sequence."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def step(engine: Engine, final: dict[str, Any], count: int = 1) -> None:
    for _ in range(count):
        final |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()


# --- rows 1 to 3: what is refused at the door ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "empty_prompt"),
        ("", "empty_prompt"),
        ([1, -1], "token_id_out_of_range"),
        ([FAKE_VOCAB, 1], "token_id_out_of_range"),
        ([10**30], "token_id_out_of_range"),
        ([float("nan")], "invalid_request"),
    ],
)
def test_a_refused_prompt_leaves_its_neighbour_alone(prompt: Any, code: str) -> None:
    engine, _ = make_engine()
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.step()
    with pytest.raises(RequestError) as caught:
        engine.add_request("bad", prompt, greedy())
    assert caught.value.code == code
    assert list(engine.requests) == ["control"]
    assert_control_unharmed(run(engine))
    assert_clean(engine)


def test_a_prompt_as_long_as_the_model_is_refused_and_one_token_less_is_served() -> None:
    engine, model = make_engine(max_model_len=40)
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    for length in (40, 41, 10**5):
        with pytest.raises(RequestError, match="at most 39 fit max_model_len=40") as caught:
            engine.add_request("long", [1] * length, greedy(max_tokens=1))
        assert caught.value.code == "context_length_exceeded"
    engine.add_request("fits", [1] * 39, greedy(max_tokens=5, ignore_eos=True))
    final = run(engine)
    assert final["fits"].outputs[0].token_ids == dense(model, [1] * 39, 1)
    assert final["fits"].outputs[0].finish_reason == "length"
    assert_control_unharmed(final)
    assert_clean(engine)


@pytest.mark.parametrize("max_tokens", [10**9, 2**63, 10**30])
def test_a_huge_max_tokens_ends_at_the_models_length(max_tokens: int) -> None:
    engine, model = make_engine(max_model_len=40)
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.add_request("huge", [1, 2], greedy(max_tokens=max_tokens, ignore_eos=True))
    final = run(engine)
    assert final["huge"].outputs[0].token_ids == dense(model, [1, 2], 38)
    assert final["huge"].outputs[0].finish_reason == "length"
    assert_control_unharmed(final)
    assert_clean(engine)


def test_what_can_never_fit_is_refused_at_admission_and_the_queue_goes_on() -> None:
    """A request alone always fits: the memory bounds the model's length. A group of them may not."""
    engine, model = make_engine(num_blocks=10, max_num_seqs=8, max_model_len=40, plugins=[SamplerPlugin(TreeSampler())])
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.add_request("before", [1, 2, 3], greedy(max_tokens=20, ignore_eos=True))
    engine.step()
    most = engine.state.kv.pool.num_usable
    for width, code in ((4, "kv_cache_too_small"), (9, "too_many_sequences")):
        with pytest.raises(RequestError) as caught:
            engine.add_request("huge", [1] * 20, TreeParams(width=width, max_tokens=20))
        assert caught.value.code == code
    assert engine.state.kv.most_blocks(20, 24, 4) <= most < engine.state.kv.most_blocks(20, 40, 4)
    engine.add_request("group", [1] * 20, TreeParams(width=4, max_tokens=4, ignore_eos=True))
    engine.add_request("behind", [7, 8], greedy(max_tokens=20, ignore_eos=True))
    final = run(engine)
    assert final["before"].outputs[0].token_ids == dense(model, [1, 2, 3], 20)
    assert final["behind"].outputs[0].token_ids == dense(model, [7, 8], 20)
    assert {completion.finish_reason for completion in final["group"].outputs} == {"length"}
    assert_control_unharmed(final)
    assert_clean(engine)


class Wide(TreeSampler):
    """Opens all rows at the first token and keeps them."""

    def step(self, logits: torch.Tensor, metadata: Any) -> Any:
        from folo_core.sampling.interface import SamplerOutput

        parents: list[int] = []
        ids = list(metadata.request_ids)
        for row, request_id in enumerate(ids):
            parents += [row] * (metadata.params[row].width if ids.count(request_id) == 1 else 1)
        index = torch.tensor(parents)
        places = [parents[:i].count(p) for i, p in enumerate(parents)]
        ranked = logits.argsort(dim=1, descending=True)
        tokens = torch.stack([ranked[p, place] for p, place in zip(parents, places, strict=True)])
        return SamplerOutput(parents=index, tokens=tokens[:, None])


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_group_that_takes_nearly_all_memory_comes_back_from_the_host(prefix_caching: bool) -> None:  # noqa: FBT001
    def serve(num_blocks: int) -> tuple[dict[str, Any], Engine]:
        engine, _ = make_engine(
            num_blocks=num_blocks, max_num_seqs=8, max_model_len=32, swap_space=SWAP, preemption="swap",
            plugins=[SamplerPlugin(Wide())], enable_prefix_caching=prefix_caching,
        )  # fmt: skip
        engine.add_request("control", CONTROL, CONTROL_PARAMS)
        engine.add_request("group", list(range(1, 17)), TreeParams(width=4, max_tokens=4, ignore_eos=True))
        final = run(engine)
        assert_clean(engine)
        return final, engine

    roomy, _ = serve(100)
    tight, engine = serve(9)
    assert engine.stats().num_swaps >= 1
    assert tight["group"].metrics.num_preemptions >= 1
    assert tight["group"].error is None
    assert [c.token_ids for c in tight["group"].outputs] == [c.token_ids for c in roomy["group"].outputs]
    assert_control_unharmed(tight)


# --- rows 4 and 5: exhaustion ---------------------------------------------------------------------------------------


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepPlanner, Request, list[Request]]]:
    """All preemptions: in which step, of whom, and who ran then."""
    noted: list[tuple[StepPlanner, Request, list[Request]]] = []
    preempt = StepPlanner.preempt

    def note(planner: StepPlanner, request: Request) -> None:
        noted.append((planner, request, list(planner.state.running)))
        preempt(planner, request)

    monkeypatch.setattr(StepPlanner, "preempt", note)
    return noted


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_ten_times_the_memory_the_oldest_finishes_first_and_the_youngest_yields(
    preemption: str, preemptions: list[Any]
) -> None:
    engine, model = make_engine(
        num_blocks=18, max_num_seqs=16, max_model_len=40, max_num_batched_tokens=64, preemption=preemption,
        swap_space=SWAP,
    )  # fmt: skip
    prompts = {str(i): [i, i + 1, i + 2, i + 3] for i in range(30)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(max_tokens=20, ignore_eos=True))
    kv = engine.state.kv
    assert 30 * kv.most_blocks(4, 24, 1) >= 10 * kv.pool.num_usable
    final = run(engine)
    assert list(final) == list(prompts), "equally long, they finish as they came"
    assert len(preemptions) >= 10
    for _, victim, running in preemptions:
        assert victim.arrival == max(request.arrival for request in running)
    assert final["0"].metrics.num_preemptions == 0
    assert (engine.stats().num_swaps >= 10) == (preemption == "swap")
    for name, prompt in prompts.items():
        assert final[name].outputs[0].token_ids == dense(model, prompt, 20)
    assert_clean(engine)


class Thrashing:
    """Gives memory to one request and takes it away for the other, step by step, as long as there are two."""

    def order(self, request: Request) -> Any:
        return (request.arrival,)

    def schedule(self, state: Any, budget: Any) -> Any:
        planner = StepPlanner(state, budget, self.order)
        following = state.waiting.peek() if state.waiting else None
        for request in state.running.copy():
            if following is None:
                planner.extend(request)
            else:
                planner.preempt(request)
        if following is not None:
            planner.admit(following)
        return planner.output


def test_a_scheduler_that_takes_memory_away_and_gives_it_back_is_named_with_its_victim() -> None:
    observer = ObserverPlugin()
    engine, model = make_engine(
        plugins=[SchedulerPlugin(Thrashing()), observer], policy="test", max_num_batched_tokens=4, max_num_seqs=4
    )
    prompts = {"a": list(range(1, 21)), "b": list(range(21, 41))}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(max_tokens=5, ignore_eos=True))
    final = run(engine, most_steps=100)
    assert sum(record.num_preempted for record in observer.records) >= 10, "they did take turns"
    (failed,) = [name for name, output in final.items() if output.error is not None]
    text = str(final[failed].error)
    assert f"request {failed!r}: scheduler 'test' makes no progress" in text
    assert f"preempted {final[failed].metrics.num_preemptions} times, wants 5 blocks; of " in text
    assert "most are held by: " in text
    assert final[failed].outputs[0].token_ids == []
    (other,) = set(prompts) - {failed}
    assert final[other].outputs[0].token_ids == dense(model, prompts[other], 5)
    assert_clean(engine)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
def test_a_step_preempts_no_more_than_ran_and_nobody_twice(
    policy: str, preemption: str, preemptions: list[Any]
) -> None:
    observer = ObserverPlugin()
    engine, model = make_engine(
        num_blocks=16, max_num_seqs=12, max_model_len=40, max_num_batched_tokens=32, policy=policy,
        preemption=preemption, swap_space=SWAP, plugins=[observer],
    )  # fmt: skip
    rng = random.Random(0)
    prompts: dict[str, list[int]] = {}
    final: dict[str, Any] = {}
    while len(prompts) < 60 or engine.has_unfinished_requests:
        if len(prompts) < 60 and len(engine.requests) < 14:
            name = str(len(prompts))
            prompts[name] = [rng.randrange(60) for _ in range(rng.randint(1, 8))]
            params = greedy(max_tokens=16, ignore_eos=True)
            engine.add_request(name, prompts[name], params, priority=rng.randrange(4), tenant=rng.choice("ab"))
        running = len(engine.state.running)
        taken, told = len(preemptions), len(observer.records)
        step(engine, final)
        assert len(preemptions) - taken <= running
        for record in observer.records[told:]:
            assert record.num_preempted <= running
        victims = [request.request_id for _, request, _ in preemptions[taken:]]
        assert len(victims) == len(set(victims))
    assert len(preemptions) >= 30
    assert sum(record.num_preempted for record in observer.records) == len(preemptions)
    for name, prompt in prompts.items():
        assert final[name].outputs[0].token_ids == dense(model, prompt, 16)
    assert_clean(engine)


# --- rows 6 and 7: parameters ----------------------------------------------------------------------------------------


def _beam(**fields: Any) -> SamplingParams:
    return pytest.importorskip("folo_beam").BeamParams(**fields)


def _fan_out(**fields: Any) -> SamplingParams:
    pytest.importorskip("folo_best_of")
    return SamplingParams(temperature=0.8, **fields)


GREEDY_FIELDS = {"temperature": 0.0}


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        (_fan_out, {"n": 10**6}, "n: 1000000: must be <= 256"),
        (_fan_out, {"best_of": 10**6}, "best_of: 1000000: must be <= 256"),
        (_beam, {"width": 10**6, "n": 10**6}, "width: 1000000: must be <= 256"),
        (TreeParams, {"width": 10**6}, "num_sequences: 1000000: must be <= 256"),
        (SamplingParams, {"logprobs": 10**6}, "logprobs: 1000000: must be from 0 to 20"),
        (SamplingParams, {"logprobs": -1}, "logprobs: -1: must be from 0 to 20"),
        (SamplingParams, {"prompt_logprobs": -1}, "prompt_logprobs: -1: must be from 0 to 20"),
    ],
)
def test_a_million_candidates_are_refused_before_anything_is_allocated(
    make: Any, fields: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make_engine(plugins=[SamplerPlugin(TreeSampler())])
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.step()
    copies: list[str] = []
    for name in ("open_sequence", "fork_sequence"):
        monkeypatch.setattr(Request, name, lambda *_, name=name: copies.append(name))
    before = engine.state.kv.usage()

    def ask() -> str:
        with pytest.raises(ParamsError) as caught:
            engine.add_request("greedy one", CONTROL, make(**fields))
        return str(caught.value)

    assert named in ask()
    gc.collect()
    tracemalloc.start()
    ask()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, "a million of anything would be more"
    assert not copies
    assert engine.state.kv.usage() == before
    monkeypatch.undo()
    assert_control_unharmed(run(engine))
    assert_clean(engine)


def test_the_caps_are_configurable() -> None:
    sampler = SamplerPlugin(TreeSampler())
    engine, _ = make_engine(max_sequences_per_request=4, max_logprobs=-1, plugins=[sampler], max_num_seqs=8)
    with pytest.raises(ParamsError, match=r"num_sequences: 5: must be <= 4 \(max_sequences_per_request\)"):
        engine.add_request("bad", [1], TreeParams(width=5))
    with pytest.raises(ParamsError, match=f"logprobs: {FAKE_VOCAB + 1}: must be from 0 to {FAKE_VOCAB}"):
        engine.add_request("bad", [1], greedy(logprobs=FAKE_VOCAB + 1))
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.add_request("four", [1], TreeParams(width=4, max_tokens=3))
    engine.add_request("all", [1], greedy(max_tokens=2, ignore_eos=True, logprobs=-1))
    final = run(engine)
    assert [len(entry) for entry in final["all"].outputs[0].logprobs] == [FAKE_VOCAB] * 2
    assert_control_unharmed(final)
    assert_clean(engine)
    wide, _ = make_engine(max_sequences_per_request=10**7, plugins=[sampler])
    with pytest.raises(RequestError, match="max_num_seqs") as caught:
        wide.add_request("bad", [1], TreeParams(width=10**6))
    assert caught.value.code == "too_many_sequences"


NO_TOKENS = [FAKE_VOCAB, -1, 10**30, float("nan"), float("inf"), 1.5, "x", "1.5", None, True, [1], {}]


@pytest.mark.parametrize("token", NO_TOKENS, ids=repr)
@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_tokens_that_are_none_are_refused_by_field_and_neighbours_are_bit_equal(field: str, token: Any) -> None:
    values: list[Any] = [[token], [1, token]]
    if field == "logit_bias":
        keys = [] if isinstance(token, (list, dict)) else [{token: 1.0}, {1: 0.5, token: 1.0}]
        # Beside tokens that are none, biases that are no numbers.
        finite = type(token) is int or token == 1.5
        values = keys if finite else [*keys, {1: token}]
    engine, _ = make_engine()
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.step()
    refused = 0
    for value in values:
        if field == "logit_bias" and len(value) == 1 and value.keys() == {1} and token is True:
            value = {2: True}  # noqa: PLW2901 (True == 1 as a key)
        with pytest.raises(ParamsError, match=field):
            engine.add_request("bad", [1, 2], greedy(**{field: value}))
        refused += 1
        engine.step()
    assert refused == len(values) >= 1
    assert_control_unharmed(run(engine))
    assert_clean(engine)


# --- row 8 and 12: steps that fail --------------------------------------------------------------------------------


def test_blocks_of_a_failed_request_are_zeroed_although_the_step_that_should_fails() -> None:
    victim = [9, 9, 9, 9, 9]
    engine, model = make_engine()
    backend = engine.executor.runner.backend

    def poison(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        for row, past in enumerate(pasts):
            if past[:5] == victim:
                logits[row] = float("nan")
        return logits

    model.edit_logits = poison
    engine.add_request("v", victim, greedy())
    final: dict[str, Any] = {}
    step(engine, final)
    assert "nan" in str(final["v"].error)
    assert (backend.cache == 9).any(), "the fault left something behind"
    zero = backend.zero_blocks
    struck: list[list[int]] = []

    def fail(blocks: list[int]) -> None:
        struck.append(blocks)
        message = "the copy engine is gone"
        raise RuntimeError(message)

    backend.zero_blocks = fail
    engine.add_request("beside", [1, 2], greedy())
    step(engine, final)
    assert struck
    assert "the copy engine is gone" in str(final["beside"].error)
    assert (backend.cache == 9).any()
    backend.zero_blocks = zero
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    step(engine, final)
    assert not (backend.cache == 9).any()
    assert_control_unharmed(final | run(engine))
    assert_clean(engine)


# --- row 9: text ----------------------------------------------------------------------------------------------------


class CountedText(str):
    """Counts the characters that searches look at."""

    __slots__ = ()
    looked_at = 0

    def find(self, string: str, start: int = 0) -> int:  # type: ignore[override]
        CountedText.looked_at += len(self) - start
        return super().find(string, start)

    def endswith(self, string: str) -> bool:  # type: ignore[override]
        CountedText.looked_at += len(string)
        return super().endswith(string)


class CountingTokenizer(FakeTokenizer):
    decoded = 0

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_near_misses_of_stop_strings_take_linear_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says nothing but beginnings of stop strings."""
    for name in ("find_stop_string", "held_back"):
        function = getattr(output_processor, name)
        monkeypatch.setattr(
            output_processor, name, lambda text, *rest, function=function: function(CountedText(text), *rest)
        )

    def work(count: int) -> tuple[int, int]:
        model, tokenizer = FakeModel(max_model_len=4096), CountingTokenizer()

        def spell(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
            for row, past in enumerate(pasts):
                logits[row] = 0
                logits[row, tokenizer.encode("AAAB")[len(past) % 4]] = 1
            return logits

        model.edit_logits = spell
        engine, _ = make_engine(model, tokenizer=tokenizer, num_blocks=1100)
        CountedText.looked_at = 0
        stop = ["AAAC", "BAAABAAAC", "AA" * 8]
        kind = RequestOutputKind.DELTA
        engine.add_request("a", [1], greedy(max_tokens=count, ignore_eos=True, stop=stop, output_kind=kind))
        pieces = []
        while engine.has_unfinished_requests:
            pieces += [output.outputs[0].text for output in engine.step()]
        assert len("".join(pieces)) == count
        assert "" in pieces, "something was held back, since a stop string could have begun"
        return CountedText.looked_at, tokenizer.decoded

    small, large = work(150), work(600)
    assert small[0] >= 150
    for fewer, more in zip(small, large, strict=True):
        assert more <= 4.2 * fewer


# --- row 10: abort ---------------------------------------------------------------------------------------------------

STATES = [
    "queued", "mid-prefill", "decoding", "preempted", "swapped", "several rows", "forked", "forked twice over",
    "source",
]  # fmt: skip


def _reach(engine: Engine, state: str, final: dict[str, Any]) -> str:  # noqa: C901 (a case for each state)
    """Bring a request into a state, beside the control request, and return its name."""
    long = list(range(1, 21))
    if state == "queued":
        engine.add_request("v", long, greedy(max_tokens=20))
        assert "v" in engine.state.waiting
    elif state == "mid-prefill":
        engine.add_request("v", long, greedy(max_tokens=12))
        step(engine, final)
        assert 0 < engine.requests["v"].live[0].num_computed_tokens < 20
    elif state in ("preempted", "swapped"):
        for i in range(6):
            engine.add_request(f"v{i}", [i, 1, 2], greedy(max_tokens=28, ignore_eos=True))
        victim = None
        while victim is None:
            step(engine, final)
            found = [r for r in engine.state.waiting if r.metrics.num_preemptions]
            victim = next((r for r in found if r.is_swapped == (state == "swapped")), None)
        assert not any(sequence.block_table for sequence in victim.live)
        assert any(sequence.host_blocks for sequence in victim.live) == (state == "swapped")
        return victim.request_id
    elif state == "several rows":
        engine.add_request("v", long[:9], TreeParams(width=4, max_tokens=6, ignore_eos=True))
        while len(engine.requests["v"].live) < 3:
            step(engine, final)
    else:
        engine.add_request("v", [1, 2, 3, 4, 5], greedy(max_tokens=20, ignore_eos=True))
        while not engine.requests["v"].live[0].data.output_token_ids:
            step(engine, final)
        if state != "decoding":
            engine.fork("v", "f")
            assert engine.requests["f"].live[0].block_table is not None
            if state == "forked twice over":
                engine.fork("f", "g")
            assert engine._forks
            return "v" if state == "source" else "f"
    return "v"


def blocks_in_tables(engine: Engine) -> tuple[int, int]:
    live = [s for request in engine.requests.values() for s in request.live]
    device = {block for s in live if s.block_table is not None for block in s.block_table.blocks}
    return len(device), len({block for s in live for block in s.host_blocks})


def assert_only_the_living_hold_memory(engine: Engine) -> None:
    kv, runner = engine.state.kv, engine.executor.runner
    device, host = blocks_in_tables(engine)
    assert kv.usage().num_used_blocks == device
    if kv.swap is not None:
        # What this step read on the host is free when the next one begins.
        assert kv.swap.pool.num_usable - kv.swap.pool.num_free - len(set(kv.swap._read_in_this_step)) == host
    live = {s.seq_id for request in engine.requests.values() for s in request.live}
    assert set(runner.batch._slots) - set(engine._released) <= live
    assert set(runner.requests) == set(engine.requests)


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_any_state_returns_all_memory_within_two_steps(
    state: str,
    prefix_caching: bool,  # noqa: FBT001
) -> None:
    engine, _ = make_engine(
        num_blocks=14, max_num_seqs=10, max_model_len=40, max_num_batched_tokens=12,
        enable_prefix_caching=prefix_caching, swap_space=SWAP, plugins=[SamplerPlugin(TreeSampler())],
        preemption="swap" if state == "swapped" else "recompute",
    )  # fmt: skip
    assert_blocks_back(engine)
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    final: dict[str, Any] = {}
    step(engine, final)
    name = _reach(engine, state, final)
    (output,) = engine.abort(name)
    assert output.finished
    assert {completion.finish_reason for completion in output.outputs} == {"abort"}
    assert engine.abort(name) == [], "once more changes nothing"
    step(engine, final)
    assert engine.abort(name) == []
    step(engine, final)
    assert name not in engine.requests
    assert_only_the_living_hold_memory(engine)
    final |= run(engine)
    assert name not in final
    assert_control_unharmed(final)
    assert_clean(engine)
    if prefix_caching and state not in ("queued", "mid-prefill"):
        assert engine.state.kv.pool.num_cached > 0


class Aborts:
    """Serves requests of all kinds under pressure, and names the state that each is in."""

    def __init__(self, seed: int, policy: str, preemption: str) -> None:
        from folo_beam import BeamParams

        self.beam = BeamParams
        self.random = random.Random(seed)
        self.engine, self.model = make_engine(
            num_blocks=40, max_num_seqs=24, max_model_len=48, max_num_batched_tokens=24, enable_prefix_caching=True,
            swap_space=SWAP, policy=policy, preemption=preemption, plugins=[SamplerPlugin(TreeSampler())],
        )  # fmt: skip
        self.greedy: dict[str, tuple[list[int], int]] = {}
        self.finished = 0
        self.ids = 0

    def name(self) -> str:
        self.ids += 1
        return str(self.ids)

    def add(self) -> None:
        rng, name = self.random, self.name()
        prompt = [rng.randrange(2)] * rng.choice([0, 4, 8]) + [rng.randrange(60) for _ in range(rng.randint(1, 16))]
        count = rng.randint(4, 16)
        kind = rng.randrange(4)
        params: SamplingParams = greedy(max_tokens=count, ignore_eos=True)
        if kind == 0:
            self.greedy[name] = (prompt, count)
        elif kind == 1:
            params = SamplingParams(n=3, temperature=0.8, max_tokens=count, ignore_eos=True)
        elif kind == 2:
            params = self.beam(width=3, n=3, max_tokens=count, ignore_eos=True)
        else:
            params = TreeParams(width=3, max_tokens=count, ignore_eos=True)
        self.engine.add_request(name, prompt, params, priority=rng.randrange(3), tenant=rng.choice(["", "a"]))

    def fork(self) -> str | None:
        for source, request in self.engine.requests.items():
            first = request.live[0]
            if first.block_table is not None and 0 < len(first.data.output_token_ids) < request.params.max_tokens - 1:
                name = self.name()
                self.engine.fork(source, name)
                return name
        return None

    def step(self) -> None:
        for output in self.engine.step():
            if not output.finished:
                continue
            assert output.error is None
            self.finished += 1
            if output.request_id in self.greedy:
                expected = dense(self.model, *self.greedy.pop(output.request_id))
                assert output.outputs[0].token_ids == expected

    def state(self, request: Request) -> str:
        first = request.live[0]
        if request.is_swapped:
            return "swapped, several rows" if len(request.live) > 1 else "swapped"
        if request.request_id in self.engine.state.waiting:
            return "preempted" if request.metrics.num_preemptions else "queued"
        if len(request.live) > 1:
            return type(request.params).__name__ + " rows"
        if first.num_uncomputed_tokens > 1:
            return "mid-prefill"
        return "decoding"


@pytest.mark.slow
def test_a_thousand_random_aborts_return_all_memory_within_two_steps() -> None:
    pytest.importorskip("folo_beam")
    pytest.importorskip("folo_best_of")
    hit: dict[str, int] = {}
    finished = 0
    settings = [
        ("fcfs", "swap"),
        ("priority", "recompute"),
        ("fair", "auto"),
        ("fcfs", "recompute"),
        ("priority", "swap"),
    ]
    for seed, (policy, preemption) in enumerate(settings):
        serving = Aborts(seed, policy, preemption)
        engine = serving.engine
        for _ in range(200):
            while len(engine.requests) < 12:
                serving.add()
            for _ in range(serving.random.randint(0, 2)):
                serving.step()
            if not engine.requests:
                continue
            states = {name: serving.state(request) for name, request in engine.requests.items()}
            forked = serving.fork() if serving.random.random() < 0.15 else None
            if forked is not None:
                states[forked] = "just forked"
            name = min(states, key=lambda one: (hit.get(states[one], 0), serving.random.random()))
            hit[states[name]] = hit.get(states[name], 0) + 1
            serving.greedy.pop(name, None)
            assert len(engine.abort(name)) == 1
            assert engine.abort(name) == []
            for _ in range(2):
                serving.step()
            assert name not in engine.requests
            assert_only_the_living_hold_memory(engine)
            engine.check_integrity()
        while engine.has_unfinished_requests:
            serving.step()
        assert_clean(engine)
        finished += serving.finished
    print(f"\naborts by state: {hit}; {finished} requests finished")
    assert sum(hit.values()) == 1000
    assert finished >= 100
    kinds = (
        "queued", "mid-prefill", "decoding", "preempted", "swapped", "swapped, several rows", "SamplingParams rows",
        "BeamParams rows", "TreeParams rows", "just forked",
    )  # fmt: skip
    for kind in kinds:
        assert hit.get(kind, 0) >= 20, f"{kind}: too few in {hit}"


# --- row 14: out of memory in a step -----------------------------------------------------------------------------


def test_steps_shrink_until_they_fit_and_no_result_changes() -> None:
    engine, model = make_engine(max_num_batched_tokens=64, max_num_seqs=8)
    sizes: list[tuple[int, bool]] = []

    def limit(input_ids: torch.Tensor) -> None:
        fits = len(input_ids) <= 10
        sizes.append((len(input_ids), fits))
        if not fits:
            message = f"no room for {len(input_ids)} tokens"
            raise MemoryError(message)

    model.before_forward = limit
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    prompts = {str(i): list(range(i, i + 20)) for i in range(7)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(max_tokens=30, ignore_eos=True))
    final = run(engine)
    tried = [size for size, _ in sizes[:4]]
    assert tried == [64, 32, 16, 8], "each half of the one before"
    assert [fits for _, fits in sizes[:4]] == [False, False, False, True]
    assert sum(not fits for _, fits in sizes) >= 4, "it tried more again later"
    for name, prompt in prompts.items():
        assert final[name].outputs[0].token_ids == dense(model, prompt, 30)
    assert_control_unharmed(final)
    assert_clean(engine)


def test_a_budget_that_was_cut_grows_back() -> None:
    engine, model = make_engine(max_num_batched_tokens=32, max_num_seqs=8)
    sizes: list[int] = []

    def fail_twice(input_ids: torch.Tensor) -> None:
        sizes.append(len(input_ids))
        if len(sizes) <= 2:
            raise MemoryError

    model.before_forward = fail_twice
    engine.add_request("control", CONTROL, CONTROL_PARAMS)
    engine.add_request("a", list(range(30)), greedy(max_tokens=100, ignore_eos=True))
    final: dict[str, Any] = {}
    step(engine, final, 2)
    assert engine.budget.max_num_batched_tokens == 8
    step(engine, final, STEPS_BEFORE_GROWTH)
    assert engine.budget.max_num_batched_tokens == 16
    step(engine, final, STEPS_BEFORE_GROWTH)
    assert engine.budget is engine._full_budget
    engine.add_request("b", list(range(30)), greedy(max_tokens=2, ignore_eos=True))
    step(engine, final)
    assert sizes[:3] == [32, 16, 8]
    assert sizes[-1] >= 30, "a whole prompt in one step again"
    final |= run(engine)
    assert final["a"].outputs[0].token_ids == dense(model, list(range(30)), 100)
    assert_control_unharmed(final)
    assert_clean(engine)


def test_what_grew_too_early_is_left_longer_the_next_time() -> None:
    """A step of two tokens never fits, and a prompt takes longer than a budget waits before it grows."""
    engine, model = make_engine(max_num_batched_tokens=8, max_num_seqs=8)
    sizes: list[int] = []

    def fail(input_ids: torch.Tensor) -> None:
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise MemoryError

    model.before_forward = fail
    prompt = [place % 60 for place in range(2 * STEPS_BEFORE_GROWTH + 8)]
    engine.add_request("a", prompt, greedy(max_tokens=2, ignore_eos=True))
    final: dict[str, Any] = {}
    for _ in range(20 * STEPS_BEFORE_GROWTH):
        if engine.has_unfinished_requests:
            step(engine, final)
    assert final["a"].outputs[0].token_ids == dense(model, prompt, 2)
    failed = [place for place, size in enumerate(sizes) if size == 2]
    assert [after - before - 1 for before, after in itertools.pairwise(failed)] == [
        STEPS_BEFORE_GROWTH, 2 * STEPS_BEFORE_GROWTH
    ]  # fmt: skip
    assert_clean(engine)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("victim_first", [True, False])
@pytest.mark.parametrize("width", [1, 3])
def test_who_does_not_fit_the_smallest_step_ends_alone(victim_first: bool, width: int, run_ahead: bool) -> None:  # noqa: FBT001
    engine, model = make_engine(
        max_num_batched_tokens=16, max_num_seqs=8, run_ahead=run_ahead, plugins=[SamplerPlugin(TreeSampler())]
    )
    token = next(t for t in range(60) if t not in (*CONTROL, *control_alone()[0]))
    struck: list[int] = []

    def fail(input_ids: torch.Tensor) -> None:
        if token in input_ids.tolist():
            struck.append(len(input_ids))
            message = "the device is full"
            raise MemoryError(message)

    model.before_forward = fail
    params = greedy() if width == 1 else TreeParams(width=width, max_tokens=4)
    for name in ("v", "control") if victim_first else ("control", "v"):
        engine.add_request(name, [token] * 8 if name == "v" else CONTROL, params if name == "v" else CONTROL_PARAMS)
    final = run(engine)
    assert struck == sorted(struck, reverse=True)
    assert len(struck) >= 2
    assert struck[-1] <= width
    error = final["v"].error
    assert isinstance(error, StepOutOfMemoryError)
    assert "the device is full" in str(error)
    assert {completion.finish_reason for completion in final["v"].outputs} == {"error"}
    assert_control_unharmed(final)
    assert_clean(engine)


@pytest.mark.parametrize(
    ("where", "at"), [("copy_blocks", 1), ("swap_out", 1), ("swap_out", 2), ("swap_in", 1), ("swap_in", 2)]
)
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_out_of_memory_while_blocks_move_changes_no_result(
    where: str,
    at: int,
    prefix_caching: bool,  # noqa: FBT001
) -> None:
    def serve(num_blocks: int) -> tuple[dict[str, Any], list[int], Engine]:
        engine, _ = make_engine(
            num_blocks=num_blocks, max_num_seqs=12, max_model_len=40, max_num_batched_tokens=40, swap_space=SWAP,
            preemption="swap", enable_prefix_caching=prefix_caching, plugins=[SamplerPlugin(Wide())],
        )  # fmt: skip
        backend = engine.executor.runner.backend
        move = getattr(backend, where)
        calls: list[int] = []

        def fail(sources: list[int], destinations: list[int]) -> None:
            calls.append(len(sources))
            if len(calls) == at:
                raise MemoryError(where)
            move(sources, destinations)

        setattr(backend, where, fail)
        engine.add_request("control", CONTROL, CONTROL_PARAMS)
        engine.add_request("group", [1, 2, 3, 4, 5], TreeParams(width=3, max_tokens=9, ignore_eos=True))
        for i in range(5):
            engine.add_request(str(i), [i, 2, 3], greedy(max_tokens=20, ignore_eos=True))
        final = run(engine)
        assert_clean(engine)
        return final, calls, engine

    plain, _, roomy = serve(200)
    final, calls, engine = serve(12)
    assert len(calls) >= at, "it struck"
    assert all(calls)
    assert engine.budget.max_num_batched_tokens < 40 or engine.step_count > STEPS_BEFORE_GROWTH
    assert roomy.stats().num_preemptions <= 7
    for name, output in plain.items():
        assert final[name].error is None
        assert [c.token_ids for c in final[name].outputs] == [c.token_ids for c in output.outputs]
    assert_control_unharmed(final)


# --- row 17: Ctrl-C -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 5])
def test_ctrl_c_in_generate_leaves_the_llm_usable_and_an_open_stream_whole(at: int) -> None:
    model = FakeModel()
    llm = make_llm(model, swap_space=SWAP, enable_prefix_caching=True)
    params = greedy(max_tokens=20, ignore_eos=True)
    stream = llm.stream({"prompt_token_ids": CONTROL}, params)
    pieces = [next(stream), next(stream)]
    calls: list[int] = []

    def interrupt(input_ids: torch.Tensor) -> None:
        calls.append(len(input_ids))
        if len(calls) == at:
            raise KeyboardInterrupt

    model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3], [7, 8]], greedy(max_tokens=9, ignore_eos=True))
    assert len(calls) == at
    assert calls[-1] >= 3, "the stream's row was in the step, too"
    assert len(llm.engine.requests) == 1, "only the stream's is left"
    (again,) = llm.generate([[1, 2, 3]], greedy(max_tokens=9, ignore_eos=True))
    assert again.outputs[0].token_ids == dense(model, [1, 2, 3], 9)
    pieces += list(stream)
    assert not llm._kept
    assert not llm._open
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == dense(model, CONTROL, 20)
    assert_clean(llm.engine)


# --- row 19: tenants --------------------------------------------------------------------------------------------------

BEGINNING = list(range(1, 18))
"""Four full blocks and a token."""


def _cached(engine: Engine, model: FakeModel, *, tenant: str = "", salt: str = "") -> int:
    prompt: dict[str, Any] = {"prompt_token_ids": BEGINNING} | ({"cache_salt": salt} if salt else {})
    engine.add_request("a", prompt, greedy(max_tokens=3, ignore_eos=True), tenant=tenant)
    output = run(engine)["a"]
    assert output.outputs[0].token_ids == dense(model, BEGINNING, 3)
    return output.num_cached_tokens


@pytest.mark.parametrize("field", ["tenant", "salt"])
def test_a_tenant_finds_its_own_beginnings_and_never_anothers(field: str) -> None:
    engine, model = make_engine(enable_prefix_caching=True)
    for name in ("A", "B", "", "A\x00", "a"):
        assert _cached(engine, model, **{field: name}) == 0, "another's is never found"
        assert _cached(engine, model, **{field: name}) == 16, "its own is"
    assert _cached(engine, model, **{field: "A"}) == 16, "still"
    engine.reset_prefix_cache()
    assert _cached(engine, model, **{field: "A"}) == 0
    assert_clean(engine)


def test_a_salt_does_not_stand_for_a_tenant() -> None:
    engine, model = make_engine(enable_prefix_caching=True)
    assert _cached(engine, model, tenant="AB") == 0
    for tenant, salt in (("A", "B"), ("", "AB"), ("AB", "x"), ("ABx", "")):
        assert _cached(engine, model, tenant=tenant, salt=salt) == 0
    assert _cached(engine, model, tenant="AB", salt="x") == 16
    assert_clean(engine)


def _serve_tenants(engine: Engine, model: FakeModel, seed: int, *, weak_hash: bool = False) -> None:
    """Serve requests that begin alike for three tenants, under pressure; compare each with the dense model."""
    rng = random.Random(seed)
    expected: dict[str, list[int]] = {}
    shared = 0
    count = 0
    while count < 80 or engine.has_unfinished_requests:
        if count < 80 and len(engine.requests) < 9:
            prompt = [rng.choice([1, 2])] * 4 + [rng.choice([1, 2])] * 4 + [rng.randrange(3) for _ in range(5)]
            length = rng.randint(1, 10)
            engine.add_request(
                str(count), prompt, greedy(max_tokens=length, ignore_eos=True), tenant=rng.choice(["", "a", "b"])
            )
            expected[str(count)] = dense(model, prompt, length)
            count += 1
        for output in engine.step():
            if output.finished:
                assert output.outputs[0].token_ids == expected.pop(output.request_id)
        engine.check_integrity()
        owners: dict[int, set[str]] = {}
        for request in engine.requests.values():
            for sequence in request.live:
                if sequence.block_table is not None:
                    for block in sequence.block_table.blocks:
                        owners.setdefault(block, set()).add(request.tenant)
                        shared += engine.state.kv.pool.references(block) > 1
        # Whose beginning a block of equal tokens follows is the digest's to say, and a weak one cannot.
        assert weak_hash or all(len(tenants) == 1 for tenants in owners.values())
    assert not expected
    assert shared, "requests of one tenant did share"
    assert engine.state.kv.stats.num_hit_tokens > 0
    assert_clean(engine)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_no_block_is_ever_shared_across_tenants(preemption: str) -> None:
    engine, model = make_engine(
        enable_prefix_caching=True, num_blocks=20, max_num_seqs=8, max_model_len=40, swap_space=SWAP,
        preemption=preemption,
    )  # fmt: skip
    _serve_tenants(engine, model, 0)
    assert engine.stats().num_preemptions >= 1


@pytest.mark.parametrize("distinct", [1, 3, 16])
def test_with_a_hash_that_collides_tokens_decide(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prefix_cache.chain
    told: dict[bytes, set[bytes]] = {}

    def weak(parent: bytes, token_ids: Any) -> bytes:
        strong = whole(parent, token_ids)
        digest = hashlib.sha256(bytes([int.from_bytes(strong[:4], "little") % distinct])).digest()
        told.setdefault(digest, set()).add(strong)
        return digest

    monkeypatch.setattr(prefix_cache, "chain", weak)
    holds: dict[int, list[int]] = {}
    commit, adopt = KVCacheManager.commit, KVCacheManager.adopt
    adopted: list[int] = []

    def note(self: KVCacheManager, sequence: Any, num_computed_tokens: int) -> None:
        commit(self, sequence, num_computed_tokens)
        if sequence.block_table is not None:
            for place in range(min(num_computed_tokens, sequence.num_tokens) // 4):
                holds[sequence.block_table.blocks[place]] = sequence.data.token_ids[4 * place : 4 * place + 4]

    def check(self: KVCacheManager, sequence: Any, found: list[int]) -> None:
        for place, block in enumerate(found):
            assert holds[block] == sequence.data.token_ids[4 * place : 4 * place + 4], "a wrong hit"
        adopted.extend(found)
        adopt(self, sequence, found)

    monkeypatch.setattr(KVCacheManager, "commit", note)
    monkeypatch.setattr(KVCacheManager, "adopt", check)
    for seed in range(3):
        engine, model = make_engine(enable_prefix_caching=True, num_blocks=40, max_num_seqs=8, max_model_len=40)
        _serve_tenants(engine, model, seed, weak_hash=True)
    assert len(told) <= distinct
    assert any(len(beginnings) > 1 for beginnings in told.values()), "digests did collide"
    assert adopted


# --- resident memory ------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_ten_thousand_requests_leave_resident_memory_where_it_was() -> None:
    engine, _ = make_engine(
        num_blocks=46, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=64, enable_prefix_caching=True,
        swap_space=SWAP, preemption="swap",
    )  # fmt: skip
    rng = random.Random(0)
    counts = {"added": 0, "aborted": 0, "finished": 0}

    def serve(until: int) -> None:
        while counts["added"] < until or engine.has_unfinished_requests:
            while counts["added"] < until and len(engine.requests) < 48:
                prompt = [rng.randrange(2)] * 4 + [rng.randrange(60) for _ in range(rng.randint(1, 6))]
                params = greedy(max_tokens=rng.randint(1, 8), ignore_eos=True, logprobs=rng.choice([None, 2]))
                engine.add_request(str(counts["added"]), prompt, params, tenant=str(counts["added"] % 2))
                counts["added"] += 1
            if rng.random() < 0.3:
                name = rng.choice(list(engine.requests))
                counts["aborted"] += len(engine.abort(name))
            counts["finished"] += sum(output.finished for output in engine.step())

    serve(1000)
    before = resident_bytes()
    serve(11_000)
    grown = resident_bytes() - before
    stats = engine.stats()
    print(f"\nresident memory after 10,000 requests: {grown / 1e6:+.1f} MB; {counts}, {stats.num_swaps} swaps")
    assert counts["aborted"] >= 300
    assert counts["aborted"] + counts["finished"] == 11_000
    assert stats.num_swaps >= 30
    assert stats.prefix_cache.num_hit_tokens > 0
    assert grown < 20e6
    assert_clean(engine)
