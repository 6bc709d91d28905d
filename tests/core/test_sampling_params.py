"""SamplingParams: vLLM's names, defaults and ranges; every problem at once; immutable and cheap to share."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folo_core.config import structure, unstructure
from folo_core.errors import FoloError, ParamsError
from folo_core.sampling_params import RequestOutputKind, SamplingParams, SamplingType, validate_batch
from folo_core.validation import Checked, FrozenMap, given_fields, integer
from strategies import BAD_FIELDS, NAN, any_sampling_params, bad_fields, few

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "bad_words": (),
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
}


def problems(**fields):
    with pytest.raises(ParamsError) as caught:
        SamplingParams(**fields)
    return caught.value.problems


def test_defaults_are_vllms():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    assert params.best_of == 1
    # Nothing is left out of the comparison above but best_of, which has a default of its own.
    assert {field.alias for field in given_fields(SamplingParams)} == {*VLLM_DEFAULTS, "best_of"}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in BAD_FIELDS[SamplingParams].items() for v in values]
)
def test_every_field_refuses_what_does_not_fit(field, value):
    [problem] = problems(**{field: value})
    assert problem.startswith(f"{field}: ")
    assert ": must " in problem


@given(bad_fields(SamplingParams))
def test_k_bad_fields_give_k_problems(fields):
    lines = problems(**fields)
    assert sorted(line.split(":")[0] for line in lines) == sorted(fields)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"n": 3, "best_of": 2}, "best_of: 2: must be >= n (3)"),
        ({"min_tokens": 17}, "min_tokens: 17: must be <= max_tokens (16)"),
        ({"stop": "x", "detokenize": False}, "stop: ('x',): stop strings need text"),
        ({"n": 2, "temperature": 0}, "temperature: 0.0: greedy decoding gives 2 equal answers"),
        ({"best_of": 2, "temperature": 1e-6}, "temperature: 0.0: greedy decoding gives 2 equal answers"),
    ],
)
def test_fields_that_contradict_each_other(fields, start):
    [problem] = problems(**fields)
    assert problem.startswith(start)


def test_a_bad_field_does_not_hide_a_contradiction_of_others():
    lines = problems(top_p=0, n=3, best_of=2, min_tokens=20)
    assert [line.split(":")[0] for line in lines] == ["top_p", "best_of", "min_tokens"]


def test_the_message_shows_the_value_shortly():
    [line] = problems(stop=["x" * 10**6, 5])
    assert len(line) < 400
    [line] = problems(max_tokens=-(10**5000))
    assert line == "max_tokens: <int>: must be an integer >= 1 or None"


def test_errors_are_value_errors_and_folo_errors():
    with pytest.raises(ValueError, match=r"temperature: -1\.0: must be a finite number >= 0"):
        SamplingParams(temperature=-1)
    assert issubclass(ParamsError, FoloError)


@pytest.mark.parametrize(
    ("fields", "normal"),
    [
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"bad_words": "word"}, {"bad_words": ("word",)}),
        ({"stop_token_ids": np.arange(3)}, {"stop_token_ids": (0, 1, 2)}),
        ({"stop_token_ids": None}, {"stop_token_ids": ()}),
        ({"allowed_token_ids": {7}}, {"allowed_token_ids": (7,)}),
        ({"allowed_token_ids": (3, 4)}, {"allowed_token_ids": (3, 4)}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": 9e-6}, {"temperature": 0.0}),
        ({"temperature": 1e-5}, {"temperature": 1e-5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {"seed": None}),
        ({"n": np.int64(3)}, {"n": 3}),
        ({"logit_bias": {"12": 1, 3: np.float32(2)}}, {"logit_bias": {12: 1.0, 3: 2.0}}),
        ({"logit_bias": {1: 1000, 2: -1000.0}}, {"logit_bias": {1: 100.0, 2: -100.0}}),
        ({"output_kind": "delta"}, {"output_kind": RequestOutputKind.DELTA}),
        ({"output_kind": "FINAL_ONLY"}, {"output_kind": RequestOutputKind.FINAL_ONLY}),
        ({"max_tokens": None}, {"max_tokens": None}),
        ({"logprobs": -1}, {"logprobs": -1}),
    ],
)
def test_habits_are_normalised(fields, normal):
    params = SamplingParams(**fields)
    for name, value in normal.items():
        assert getattr(params, name) == value
        assert type(getattr(params, name)) in {type(value), FrozenMap}


@given(any_sampling_params())
def test_valid_params_hold_their_invariants(params):
    assert params.num_sequences == params.best_of >= params.n >= 1
    assert params.max_tokens is None or params.min_tokens <= params.max_tokens
    assert params.temperature == 0 or params.temperature >= 1e-5
    assert all(-100 <= bias <= 100 for bias in (params.logit_bias or {}).values())
    expected = SamplingType.RANDOM if params.temperature > 0 else SamplingType.GREEDY
    assert params.sampling_type is (SamplingType.FAN_OUT if params.best_of > 1 else expected)


@given(any_sampling_params())
def test_params_survive_every_copy(params):
    table = unstructure(params)
    assert structure(SamplingParams, table) == params
    assert pickle.loads(pickle.dumps(params)) == params  # noqa: S301 (its own bytes)
    for twin in (copy.deepcopy(params), copy.copy(params), attrs.evolve(params)):
        assert twin == params
        assert hash(twin) == hash(params)


def test_json_names_are_the_constructors():
    params = structure(SamplingParams, {"best_of": 3, "n": 2, "logit_bias": {"5": 1}, "output_kind": "delta"})
    assert (params.best_of, params.logit_bias, params.output_kind) == (3, {5: 1.0}, RequestOutputKind.DELTA)
    assert unstructure(params)["output_kind"] == "delta"


def test_what_the_engine_fills_in_is_no_option():
    params = attrs.evolve(SamplingParams(), resolved_eos=(2,))
    assert params.resolved_eos == (2,)
    assert repr(params) == "SamplingParams()"
    assert "resolved_eos" not in unstructure(params)
    with pytest.raises(ParamsError, match=r"resolved_eos: \[2\]: unknown"):
        structure(SamplingParams, {"resolved_eos": [2]})


def test_unknown_names_are_refused_with_the_closest_one():
    with pytest.raises(ParamsError) as caught:
        structure(SamplingParams, {"temprature": 1.0, "top_p": 5})
    assert caught.value.problems == [
        "temprature: 1.0: unknown; did you mean 'temperature'?",
        "top_p: 5.0: must be a finite number > 0 and <= 1",
    ]


def test_params_cannot_change():
    source = {1: 2.0}
    params = SamplingParams(logit_bias=source)
    source[1] = NAN
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        params.n = 2
    with pytest.raises(TypeError):
        params.logit_bias[1] = 5.0
    with pytest.raises(AttributeError, match="a FrozenMap cannot change"):
        params.logit_bias._items = {}
    with pytest.raises(TypeError):
        SamplingParams(3)


def test_best_of_follows_n_in_copies():
    assert attrs.evolve(SamplingParams(n=2), n=4).best_of == 4
    assert attrs.evolve(SamplingParams(n=2, best_of=5), n=4).best_of == 5


def test_sampling_type_is_worked_out_once(monkeypatch):
    params = SamplingParams(temperature=0.5)
    assert params.sampling_type is SamplingType.RANDOM
    monkeypatch.setattr(SamplingParams, "best_of", property(lambda _: pytest.fail("worked out again")))
    assert params.sampling_type is SamplingType.RANDOM


def test_repr_tells_what_differs_from_the_defaults():
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(n=2, best_of=3, temperature=0.5)) == "SamplingParams(n=2, best_of=3, temperature=0.5)"


class TestValidateFor:
    VOCAB = 100

    def refused(self, params, **caps):
        with pytest.raises(ParamsError) as caught:
            params.validate_for(self.VOCAB, **caps)
        return caught.value.problems

    @pytest.mark.parametrize(
        ("fields", "start"),
        [
            ({"n": 10**6}, "n: 1000000: must be <= 256"),
            ({"best_of": 10**6}, "best_of: 1000000: must be <= 256"),
            ({"logprobs": -1}, "logprobs: -1: must be from 0 to 20"),
            ({"logprobs": 21}, "logprobs: 21: must be from 0 to 20"),
            ({"prompt_logprobs": 10**9}, "prompt_logprobs: 1000000000: must be from 0 to 20"),
            ({"stop_token_ids": [5, 100]}, "stop_token_ids: 100: outside the vocabulary; token ids end at 99"),
            ({"allowed_token_ids": [2**60]}, f"allowed_token_ids: {2**60}: outside the vocabulary"),
            ({"logit_bias": {"100": 1}}, "logit_bias: 100: outside the vocabulary"),
        ],
    )
    def test_what_the_model_or_the_caps_forbid(self, fields, start):
        [problem] = self.refused(SamplingParams(**fields))
        assert problem.startswith(start)

    def test_all_at_once(self):
        params = SamplingParams(n=300, logprobs=50, stop_token_ids=[200], logit_bias={300: 1.0})
        names = [line.split(":")[0] for line in self.refused(params)]
        assert names == ["n", "logprobs", "stop_token_ids", "logit_bias"]

    def test_the_edges_are_inside(self):
        params = SamplingParams(n=256, logprobs=20, allowed_token_ids=[99], stop_token_ids=[0], logit_bias={99: -1})
        params.validate_for(self.VOCAB)

    def test_caps_can_be_lifted_but_the_vocabulary_cannot(self):
        SamplingParams(logprobs=-1, n=500).validate_for(self.VOCAB, max_logprobs=-1, max_sequences=500)
        SamplingParams(logprobs=100).validate_for(self.VOCAB, max_logprobs=-1)
        assert self.refused(SamplingParams(logprobs=101), max_logprobs=-1) == [
            "logprobs: 101: must be from 0 to 100; the engine's max_logprobs sets the cap"
        ]

    @given(any_sampling_params(), st.integers(1, 300_000))
    def test_agrees_with_a_plain_reading(self, params, vocab):
        ids = [*params.stop_token_ids, *(params.allowed_token_ids or ()), *(params.logit_bias or ())]
        counts = [vocab if c == -1 else c for c in (params.logprobs, params.prompt_logprobs) if c is not None]
        fine = all(i < vocab for i in ids) and all(c <= min(20, vocab) for c in counts)
        assert (params.problems_for(vocab) == []) is fine


class TestValidateBatch:
    def test_an_object_used_many_times_is_checked_once(self, monkeypatch):
        calls = []
        check = SamplingParams.problems_for
        monkeypatch.setattr(SamplingParams, "problems_for", lambda *args: calls.append(args[0]) or check(*args))
        one, other = SamplingParams(), SamplingParams(temperature=0.5)
        validate_batch([one] * 1000 + [other], vocab_size=10)
        assert calls == [one, other]

    def test_every_problem_has_its_index(self):
        bad, worse = SamplingParams(stop_token_ids=[10]), SamplingParams(logprobs=30, n=3)
        with pytest.raises(ParamsError) as caught:
            validate_batch([SamplingParams(), bad, bad, worse], vocab_size=10, max_sequences=2)
        starts = [line.split(": ")[0] for line in caught.value.problems]
        assert starts == ["[1].stop_token_ids", "[3].n", "[3].logprobs"]

    @few
    @given(st.lists(any_sampling_params(), max_size=5), st.integers(1, 300_000))
    def test_refuses_exactly_what_one_by_one_refuses(self, batch, vocab):
        expected = [f"[{i}].{line}" for i, params in enumerate(batch) for line in params.problems_for(vocab)]
        found = []
        try:
            validate_batch([*batch, *batch], vocab_size=vocab)
        except ParamsError as error:
            found = error.problems
        assert found == expected


@attrs.frozen(slots=True, kw_only=True)
class BeamParams(SamplingParams):
    width: int = attrs.field(default=4, metadata=integer(low=1))
    groups: int = 1

    def check(self):
        uneven = self.width % self.groups
        return [*super().check(), *([f"groups: {self.groups}: must divide width ({self.width})"] if uneven else [])]


class TestStrategyParams:
    def test_a_subclass_adds_fields_and_checks(self):
        params = BeamParams(width=6, groups=3, temperature=0, n=2)  # greedy with n > 1: the strategy's own business
        assert (params.width, params.sampling_type, params.n) == (6, SamplingType.FAN_OUT, 2)
        assert structure(BeamParams, unstructure(params)) == params
        assert attrs.evolve(params, n=1) != params

    def test_its_problems_join_the_others(self):
        with pytest.raises(ParamsError) as caught:
            BeamParams(width=4, groups=3, top_p=7.0)
        assert [line.split(":")[0] for line in caught.value.problems] == ["top_p", "groups"]

    def test_a_check_that_trips_over_a_bad_field_does_not_hide_it(self):
        with pytest.raises(ParamsError) as caught:
            BeamParams(width="4", n=0)
        assert [line.split(":")[0] for line in caught.value.problems] == ["n", "width"]

    def test_a_check_that_fails_by_itself_is_not_swallowed(self):
        with pytest.raises(ZeroDivisionError):
            BeamParams(groups=0)

    def test_wrong_types_of_fields_without_a_rule_are_refused_when_read(self):
        with pytest.raises(ParamsError) as caught:
            structure(BeamParams, {"groups": "3", "width": 0})
        assert caught.value.problems == ["width: 0: must be an integer >= 1", "groups: '3': must be int"]


def test_a_class_without_fields_is_fine():
    @attrs.frozen(slots=True, kw_only=True, repr=False)
    class Nothing(Checked):
        pass

    assert repr(Nothing()) == "Nothing()"


def test_importing_needs_no_torch():
    code = "import sys; import folo_core.sampling_params; sys.exit('torch' in sys.modules or 'cattrs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
