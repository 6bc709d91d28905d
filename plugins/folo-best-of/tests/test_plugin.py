"""The distribution as a plugin: the conformance kit, its parameters, and documentation for every part."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from folo_best_of import BestOfParams, plugin
from folo_core.config import structure
from folo_core.errors import ParamsError
from folo_core.plugins.fields import own_fields
from folo_core.sampling_params import SamplingParams
from folo_core.testing.conformance import PluginConformance, SamplerConformance

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


class TestPlugin(PluginConformance):
    plugin = "folo-best-of"


class TestFanOut(SamplerConformance):
    plugin, name = "folo-best-of", "fan-out"


class TestBestOf(SamplerConformance):
    plugin, name = "folo-best-of", "best-of"


@pytest.mark.parametrize("spec", plugin.folo_samplers(), ids=lambda spec: spec.name)
def test_every_part_is_in_the_readme(spec):
    assert f"| `{spec.name}` |" in README
    for field in own_fields(spec.params_type):
        assert f"| `{field['name']}` | {field['default']} |" in README


def test_parameters_are_read_from_plain_data():
    params = structure(BestOfParams, {"n": 2, "best_of": 4, "length_penalty": 1, "early_stop": False})
    assert params == BestOfParams(n=2, best_of=4, length_penalty=1.0, early_stop=False)
    assert type(params.length_penalty) is float
    assert attrs.evolve(params, n=3).best_of == 4


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"temperature": 0.0}, "temperature: 0.0: candidates are drawn at random; use > 0"),
        ({"temperature": 0.0, "best_of": 3}, "temperature: 0.0: candidates are drawn at random; use > 0"),
        ({"n": 3, "best_of": 2}, "best_of: 2: must be >= n"),
        ({"length_penalty": 11.0}, "length_penalty: 11.0: must be a finite number from -10 to 10"),
        ({"length_penalty": float("inf")}, "length_penalty: inf: must be a finite number"),
        ({"early_stop": "never"}, "early_stop: 'never': must be true or false"),
    ],
)
def test_bad_parameters_are_refused_by_name(fields, line):
    with pytest.raises(ParamsError) as caught:
        BestOfParams(**fields)
    assert line in str(caught.value)


def test_greedy_parameters_of_several_answers_are_refused():
    with pytest.raises(ParamsError, match=r"temperature: 0\.0: greedy decoding gives 3 equal answers"):
        SamplingParams(best_of=3, temperature=0)


def test_what_parameters_say_of_their_answers():
    ranked, whole = BestOfParams(n=2, best_of=4), BestOfParams(n=4)
    assert (ranked.num_sequences, ranked.grows_in_place, ranked.is_scored) == (4, False, True)
    assert (whole.num_sequences, whole.grows_in_place, whole.is_scored) == (4, True, True)
    assert BestOfParams().is_scored
