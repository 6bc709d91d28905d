"""Guidance: two models combined as a dense loop does it, the same under preemption and beside neighbours, refusals."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import assert_clean, greedy, run
from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.errors import ConfigError, FoloError, OutOfBlocksError, ParamsError
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.testing.builders import logits_of, make_context, make_metadata, make_request
from folo_core.testing.conformance import PluginConformance, SamplerConformance
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer
from folo_core.testing.harness import SamplerHarness
from folo_guidance import GuidanceConfig, GuidanceParams

SECTION = {"folo-guidance": {"guide": "small"}}
CONFIG = EngineConfig.from_options(model="x", plugins={"folo-guidance": GuidanceConfig(guide="small")})


class TestPlugin(PluginConformance):
    plugin = "folo-guidance"


class TestSampler(SamplerConformance):
    plugin, name = "folo-guidance", "guidance"

    def find(self):
        """The part in an engine that names a guide."""
        found = super().find()

        def build(context):
            config = attrs.evolve(context.config or CONFIG, plugins=CONFIG.plugins)
            return found.spec.factory(attrs.evolve(context, config=config))

        return attrs.evolve(found, spec=attrs.evolve(found.spec, factory=build))


MAIN, GUIDE = FakeModel(seed=1), FakeModel(seed=2)


def make_guided(guide: FakeModel = GUIDE, *, sections: Any = SECTION, **options: Any) -> Engine:
    given_ = {"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 512, "block_size": 4} | options
    config = EngineConfig.from_options(plugins=sections, **given_)
    plugin = FakePlugin(FakeModel(seed=1), FakeTokenizer(), {"small": guide})
    return Engine(build_components(config, load_registry(extra=[plugin])))


def guide_of(engine: Engine) -> Any:
    return engine.executor.runner.stage.samplers["folo-guidance:guidance"].part._guide


def assert_guide_clean(engine: Engine) -> None:
    assert_clean(engine)
    guide = guide_of(engine)
    guide.check_integrity()
    assert guide._empty.pool.num_free == guide._empty.pool.num_usable


def combine(main: torch.Tensor, guide: torch.Tensor, params: GuidanceParams) -> torch.Tensor:
    """The definition, in float64, in probabilities."""
    p_main, p_guide = main.double().softmax(-1), guide.double().softmax(-1)
    mixed = (p_guide.log() + params.scale * (p_main.log() - p_guide.log())).masked_fill(p_main == 0, -math.inf)
    return mixed.masked_fill(p_main < params.plausibility * p_main.max(), -math.inf)


def dense(prompt: list[int], params: GuidanceParams, bias: dict[int, float] | None = None) -> list[int]:
    """Both models anew for every token, and the plain sampler on what comes of them."""
    kind = SamplingType.GREEDY if params.temperature == 0 else SamplingType.RANDOM
    sampler = make_context(vocab_size=64).plain_sampler(kind)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        main = MAIN.logits_after(tokens)
        for token, value in (bias or {}).items():
            main[token] += value
        mixed = combine(main, GUIDE.logits_after(tokens), params).float()[None]
        metadata = make_metadata([params], vocab_size=64, histories=[tokens])
        tokens.append(int(sampler.step(mixed, metadata).tokens))
        if tokens[-1] == 63:
            break
    return tokens[len(prompt) :]


# --- what is computed ------------------------------------------------------------------------------------------------

FIELDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 8, "top_p": 0.9},
    {"seed": 3, "min_p": 0.05, "temperature": 1.5},
]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_tokens_are_those_of_a_dense_loop_over_both_models(scale):
    engine, expected = make_guided(max_num_seqs=64), {}
    for i, fields in enumerate(FIELDS):
        for plausibility in (0.0, 0.1, 0.6):
            params = GuidanceParams(scale=scale, plausibility=plausibility, max_tokens=12, **fields)
            name, prompt = f"{i}-{plausibility}", [i + 1, 2, 3 + i]
            engine.add_request(name, prompt, params)
            expected[name] = dense(prompt, params)
    final = run(engine)
    assert {name: output.outputs[0].token_ids for name, output in final.items()} == expected
    if scale != 1:
        assert_guide_clean(engine)
        plain = [dense(list(o.prompt_token_ids), GuidanceParams(scale=1, max_tokens=12, temperature=0.0))
                 for name, o in final.items() if name.startswith("0")]  # fmt: skip
        assert plain != [o.outputs[0].token_ids for name, o in final.items() if name.startswith("0")]


def test_logits_processors_come_before_the_guide():
    bias = {5: 3.0, 9: 4.0, 11: -50.0}
    params = GuidanceParams(scale=2.0, plausibility=0.2, temperature=0.0, max_tokens=15, logit_bias=bias)
    engine = make_guided()
    engine.add_request("a", [1, 2], params)
    answer = run(engine)["a"].outputs[0].token_ids
    assert answer == dense([1, 2], params, bias)
    assert answer != dense([1, 2], params)


def test_masked_tokens_stay_masked_whatever_the_scale():
    allowed = [3, 5, 8]
    engine = make_guided()
    for scale in (0.0, 0.5, 4.0):
        params = GuidanceParams(scale=scale, seed=1, max_tokens=30, allowed_token_ids=allowed, ignore_eos=True)
        engine.add_request(str(scale), [1, 2], params)
    for output in run(engine).values():
        assert output.error is None
        assert set(output.outputs[0].token_ids) <= set(allowed)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_scale_1_without_plausibility_is_the_plain_sampler_and_needs_no_guide(seed, temperature, top_p, penalty):
    fields = {"seed": seed, "temperature": temperature, "top_p": top_p, "repetition_penalty": penalty, "logprobs": 1}
    engine = make_guided(sections={})
    engine.add_request("plain", [seed % 60, 1], SamplingParams(**fields))
    engine.add_request("guided", [seed % 60, 1], GuidanceParams(scale=1, **fields))
    final = run(engine)
    plain, guided = final["plain"].outputs[0], final["guided"].outputs[0]
    assert (guided.token_ids, guided.logprobs, guided.text) == (plain.token_ids, plain.logprobs, plain.text)
    assert guide_of(engine) is None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    scale=st.floats(0, 5),
    plausibility=st.floats(0, 1),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_plausible_tokens_alone_are_chosen(seed, scale, plausibility, temperature):
    params = GuidanceParams(scale=scale, plausibility=plausibility, temperature=temperature, seed=seed)
    main = logits_of([seed], 37)
    sampler = build(Reader(lambda history: logits_of([-1, *history], 37)))
    harness = SamplerHarness(sampler, 37, lambda _, __: main)
    harness.add(make_request("a", params))
    output = harness.step()
    probs = main.softmax(-1)
    assert probs[int(output.tokens)] >= plausibility * probs.max() * (1 - 1e-5)


# --- the guide as a part ---------------------------------------------------------------------------------------------


class Reader:
    """A guide that is a function, with room for few rows."""

    def __init__(self, logits_after: Any, most: int = 1000) -> None:
        self.logits_after, self.most, self.calls = logits_after, most, 0
        self.forgotten: list[str] = []

    def logits(self, keys: Any, histories: Any) -> torch.Tensor:
        assert len(set(keys)) == len(keys) == len(histories)
        if len(keys) > self.most:
            raise OutOfBlocksError("too many rows")
        self.calls += 1
        return torch.stack([self.logits_after(history) for history in histories])

    def forget_request(self, request_id: str) -> None:
        self.forgotten.append(request_id)


def build(reader: Reader) -> Any:
    context = make_context(vocab_size=37, config=CONFIG, side_model=lambda _: reader)
    return load_registry().get("samplers", "folo-guidance:guidance").build(context)


def guided_answers(reader: Reader, count: int) -> dict[str, list[list[int]]]:
    requests = [make_request(f"r{i}", GuidanceParams(seed=i), prompt=(1, i)) for i in range(count)]
    return SamplerHarness(build(reader), 37).run(requests, 5)


def test_a_guide_short_of_memory_reads_in_several_passes():
    def after(history: Any) -> torch.Tensor:
        return logits_of([-1, *history], 37)

    whole, split = Reader(after), Reader(after, most=2)
    assert guided_answers(whole, 7) == guided_answers(split, 7)
    assert (whole.calls, split.calls) == (5, 5 * 4)
    assert split.forgotten == [f"r{i}" for i in range(7)]
    with pytest.raises(OutOfBlocksError):
        guided_answers(Reader(after, most=0), 2)


def test_a_guide_that_says_nan_ends_its_own_request_alone():
    def table(engine_guide: FakeModel) -> FakeModel:
        def poison(logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
            for row, past in enumerate(pasts):
                if past[0] == 7 and len(past) > 4:
                    logits[row, 3] = math.nan
            return logits

        engine_guide.edit_logits = poison
        return engine_guide

    def answers(guide: FakeModel) -> Any:
        engine = make_guided(guide)
        for i in (5, 7, 9):
            engine.add_request(str(i), [i, 1], GuidanceParams(seed=i, max_tokens=8, ignore_eos=True))
        final = run(engine)
        assert_guide_clean(engine)
        return final

    final, sound = answers(table(FakeModel(seed=2))), answers(FakeModel(seed=2))
    assert isinstance(final["7"].error, FoloError)
    assert "the guide's logits cannot be sampled: NaN" in str(final["7"].error)
    for name in ("5", "9"):
        assert final[name].error is None
        assert final[name].outputs[0].token_ids == sound[name].outputs[0].token_ids


def test_tokens_that_the_guide_excludes_leave_numbers():
    def excludes(_: Any) -> torch.Tensor:
        return torch.full((37,), -math.inf).index_fill(0, torch.tensor([4, 6]), 0.0)

    reader = Reader(excludes)
    for scale, expected in ((0.5, {4, 6}), (2.0, set(range(37)) - {4, 6})):
        requests = [make_request(f"r{i}", GuidanceParams(scale=scale, seed=i)) for i in range(20)]
        answers = SamplerHarness(build(reader), 37).run(requests, 3)
        assert [len(row) for rows in answers.values() for row in rows] == [3] * 20
        assert {token for rows in answers.values() for row in rows for token in row} <= expected


# --- in an engine ----------------------------------------------------------------------------------------------------


def run_mixed(order: int = 1, **options: Any) -> tuple[dict[str, Any], int, Engine]:
    engine = make_guided(**({"max_num_seqs": 16, "max_model_len": 64} | options))
    for i in range(8)[::order]:
        prompt = [i, 2, 3] * (1 + i % 3)
        fields = {"max_tokens": 25 + i, "ignore_eos": i < 5, "seed": i, "temperature": [0.0, 1.0][i % 2]}
        scale = [1.5, 0.5, 1.0, 2.5][i % 4]
        engine.add_request(f"guided-{i}", prompt, GuidanceParams(scale=scale, plausibility=0.05 * i, **fields))
        engine.add_request(f"plain-{i}", prompt, greedy(max_tokens=20))
    metrics = [request.metrics for request in engine.requests.values()]
    final = run(engine)
    assert_guide_clean(engine)
    answers = {name: (o.error, o.outputs[0].token_ids, o.outputs[0].text) for name, o in final.items()}
    return answers, sum(m.num_preemptions for m in metrics), engine


def test_preemption_neighbours_and_order_change_nothing():
    calm, none, _ = run_mixed()
    assert none == 0
    assert all(error is None for error, _, _ in calm.values())
    assert len({str(tokens) for _, tokens, _ in calm.values()}) >= 15
    tight, preemptions, _ = run_mixed(num_blocks=40, max_num_batched_tokens=16)
    assert preemptions > 3
    assert tight == calm
    assert run_mixed(order=-1)[0] == calm
    assert run_mixed(max_num_seqs=1)[0] == calm


def test_the_guide_computes_each_token_once():
    _, _, engine = run_mixed()
    guided = [i for i in range(8) if i % 4 != 2]
    most = sum(3 * (1 + i % 3) + 25 + i for i in guided)
    assert guide_of(engine).num_computed_tokens <= most


def test_abort_in_the_middle_returns_the_blocks_of_both_models():
    engine = make_guided()
    engine.add_request("a", [1, 2, 3], GuidanceParams(max_tokens=50, ignore_eos=True))
    engine.add_request("b", [4, 2, 3], GuidanceParams(max_tokens=20, temperature=0.0))
    for _ in range(6):
        engine.step()
    pool = guide_of(engine)._empty.pool
    assert pool.num_free < pool.num_usable
    engine.abort("a")
    final = run(engine)
    expected = dense([4, 2, 3], GuidanceParams(max_tokens=20, temperature=0.0))
    assert final["b"].outputs[0].token_ids == expected
    assert_guide_clean(engine)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_without_a_guide_a_request_is_refused_with_the_option_to_set():
    engine = make_guided(sections={})
    with pytest.raises(ParamsError, match=r"scale: 2\.0: no guiding model is configured.*\[plugins\.folo-guidance\]"):
        engine.add_request("a", [1], GuidanceParams(scale=2))
    assert_clean(engine)
    engine.add_request("a", [1], GuidanceParams(scale=1))
    assert run(engine)["a"].error is None


def test_a_guide_that_does_not_exist_or_fit_is_refused_by_name():
    engine = make_guided(FakeModel(max_model_len=100))
    with pytest.raises(ConfigError, match="model 'small' reads 100 tokens"):
        engine.add_request("a", [1], GuidanceParams())
    assert_clean(engine)
    with pytest.raises(ConfigError, match="guide: 7: must be a model"):
        make_guided(sections={"folo-guidance": {"guide": 7}})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n: 2: guidance gives one answer"),
        ({"best_of": 2}, "guidance gives one answer (best_of=2)"),
        ({"scale": -0.1}, "scale: -0.1: must be a finite number >= 0"),
        ({"scale": math.inf}, "scale: inf"),
        ({"plausibility": 1.1}, "plausibility: 1.1: must be a finite number from 0 to 1"),
    ],
)
def test_wrong_parameters_are_refused_by_name(fields, words):
    with pytest.raises(ParamsError) as caught:
        GuidanceParams(**fields)
    assert words in str(caught.value)
