"""Strategies by name: which params class, which fields, and what is said of a wrong one."""

from __future__ import annotations

import attrs
import pytest

from engines import SamplerPlugin
from folo_core.errors import ParamsError, PluginError
from folo_core.plugins.manager import load_registry
from folo_core.plugins.strategies import params_from_options, parse_options
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.validation import as_int, boolean, integer


@attrs.frozen(slots=True, kw_only=True)
class WideParams(SamplingParams):
    width: int = attrs.field(default=4, converter=as_int, metadata=integer(low=1))
    patient: bool = attrs.field(default=False, metadata=boolean())


REGISTRY = load_registry(extra=[SamplerPlugin(object(), WideParams)])


def params(strategy: str | None, *options: str, **flags: object) -> SamplingParams:
    return params_from_options(strategy, options, flags, REGISTRY)


@pytest.mark.parametrize("name", ["test", "test-sampler:test"])
def test_a_strategys_name_picks_its_class(name: str) -> None:
    built = params(name, "width=7", "patient=true", "stop=The end", "stop_token_ids=[1, 2]", max_tokens=9, seed=None)
    assert built == WideParams(width=7, patient=True, stop="The end", stop_token_ids=[1, 2], max_tokens=9)
    assert type(built) is WideParams
    assert built.temperature == 1.0, "a strategy's own default holds"


def test_options_win_over_flags_and_the_last_of_equals_holds() -> None:
    assert params("test", "max_tokens=3", "max_tokens=4", max_tokens=9).max_tokens == 4


def test_without_a_strategy_decoding_is_greedy_unless_told_otherwise() -> None:
    assert params(None, max_tokens=3) == SamplingParams(temperature=0.0, max_tokens=3)
    assert params(None, "temperature=0.5", "n=2").sampling_type is SamplingType.FAN_OUT
    assert params_from_options(None, [], {"temperature": 0.7}).temperature == 0.7


def test_plain_strategies_get_what_they_serve_or_say_what_is_asked() -> None:
    assert params("greedy").sampling_type is SamplingType.GREEDY
    assert params("random").sampling_type is SamplingType.RANDOM
    with pytest.raises(ParamsError, match="'greedy': serves greedy sampling, and these parameters ask for random"):
        params("greedy", temperature=1.0)


def test_an_unknown_field_is_named_with_a_suggestion_and_all_that_there_are() -> None:
    with pytest.raises(ParamsError) as caught:
        params("test", "widht=3", "zzz=1")
    first, second = caught.value.problems
    assert first.startswith("widht: 3: WideParams has no such field; did you mean 'width'? it has: width, patient, n, ")
    assert "did you mean" not in second
    assert "resolved_eos" not in second, "the engine's own fields are nobody's to give"


def test_every_bad_value_is_told_at_once() -> None:
    with pytest.raises(ParamsError) as caught:
        params("test", "width=0", "patient=maybe", max_tokens="x")
    assert sorted(line.split(":")[0] for line in caught.value.problems) == ["max_tokens", "patient", "width"]


def test_an_unknown_strategy_is_refused_with_a_suggestion() -> None:
    with pytest.raises(PluginError, match="did you mean 'greedy'"):
        params_from_options("gredy", [], {})


@pytest.mark.parametrize("option", ["width", "=3", ""])
def test_an_option_is_a_field_and_a_value(option: str) -> None:
    with pytest.raises(ParamsError, match="write FIELD=VALUE"):
        parse_options([option])


def test_values_are_json_or_text() -> None:
    texts = ["a=1", "b=1.5", "c=null", "d=[1]", "e=never", "f=x=y", 'g="1"', "h=" + "[" * 100_000]
    values = list(parse_options(texts).values())
    assert values[:-1] == [1, 1.5, None, [1], "never", "x=y", "1"]
    assert values[-1][0] == "[", "nested too deep to be JSON: text"
