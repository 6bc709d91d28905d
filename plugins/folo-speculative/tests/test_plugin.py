"""The plugin as it is installed: the conformance suite, its parameters, its section and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from speculation import make_engine, run

from folo_core.config import EngineConfig
from folo_core.errors import ConfigError, ParamsError
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.sampling.interface import Proposer
from folo_core.sampling_params import SamplingParams
from folo_core.testing.conformance import PluginConformance, SamplerConformance
from folo_speculative import SpeculativeConfig, SpeculativeParams


class TestPlugin(PluginConformance):
    plugin = "folo-speculative"


class TestSampler(SamplerConformance):
    plugin = "folo-speculative"
    name = "speculative"

    def params(self, part):
        return [
            SpeculativeParams(temperature=0, min_ngram=1),
            SpeculativeParams(seed=3, min_ngram=1, num_draft_tokens=2),
            SpeculativeParams(seed=4, temperature=0.5, top_k=5, top_p=0.9, min_ngram=1),
            SpeculativeParams(seed=5, min_p=0.1),
        ]


def test_importing_the_package_imports_no_torch():
    code = "import sys, folo_speculative; folo_speculative.SpeculativeParams(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_speculative_params_are_sampling_params_of_one_sequence():
    params = SpeculativeParams(temperature=0.7, top_p=0.9)
    assert isinstance(params, SamplingParams)
    assert (params.num_sequences, params.grows_in_place, params.is_scored) == (1, True, False)
    assert params == SpeculativeParams(temperature=0.7, top_p=0.9)
    assert params != SamplingParams(temperature=0.7, top_p=0.9)


@pytest.mark.parametrize("fields", [{"n": 2}, {"best_of": 2}, {"n": 3, "best_of": 4}, {"n": 2, "temperature": 0}])
def test_several_answers_are_refused_with_the_reason(fields):
    name = "best_of" if "best_of" in fields else "n"
    with pytest.raises(ParamsError, match=rf"{name}: {fields[name]}: speculation follows one answer.*fork theirs"):
        SpeculativeParams(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens: 0: must be an integer from 1 to 64"),
        ({"num_draft_tokens": True}, "num_draft_tokens: True"),
        ({"proposer": ""}, "ngram or draft-model"),
        ({"proposer": 3}, "ngram or draft-model"),
        ({"min_ngram": 5, "max_ngram": 4}, r"min_ngram: 5: must be <= max_ngram \(4\)"),
        ({"max_ngram": 99}, "max_ngram: 99"),
        ({"greedy_draft": 1}, "greedy_draft: 1: must be true or false"),
    ],
)
def test_wrong_parameters_are_refused_by_name(fields, match):
    with pytest.raises(ParamsError, match=match):
        SpeculativeParams(**fields)


def test_the_section_is_typed_and_checked():
    assert SpeculativeConfig().draft_model is None
    with pytest.raises(ConfigError, match="draft_model: 3: must be a model"):
        SpeculativeConfig(draft_model=3)
    config = EngineConfig.from_options(model="x", plugins={"folo-speculative": {"draft_modle": "y"}})
    with pytest.raises(ConfigError, match=r"plugins.folo-speculative.draft_modle: .*did you mean 'draft_model'"):
        build_components(config, load_registry())


def test_a_proposer_that_is_not_there_is_refused_when_the_request_comes():
    engine = make_engine()
    with pytest.raises(ParamsError, match=r"proposer: 'ngrm'.*did you mean 'ngram'"):
        engine.add_request("a", [1, 2], SpeculativeParams(proposer="ngrm"))
    with pytest.raises(ParamsError, match=r"proposer: 'draft-model': plugins.folo-speculative.draft_model: None"):
        engine.add_request("a", [1, 2], SpeculativeParams(proposer="draft-model"))
    engine.add_request("a", [1, 2], SpeculativeParams(proposer="folo-speculative:ngram", max_tokens=4))
    assert len(run(engine)["a"].outputs[0].token_ids) <= 4


def test_its_proposers_keep_the_contract():
    registry = load_registry()
    assert {"ngram", "draft-model"} <= {part.name for part in registry.all("proposers")}
    assert isinstance(registry.get("proposers", "ngram").build(None), Proposer)
