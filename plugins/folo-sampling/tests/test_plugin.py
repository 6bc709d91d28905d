"""The distribution as a plugin: the conformance kit, and help and documentation for every part."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from folo_core.plugins.specs import SamplerSpec
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_context
from folo_core.testing.conformance import LogitsProcessorConformance, PluginConformance, SamplerConformance
from folo_sampling import plugin

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SPECS = [*plugin.folo_samplers(), *plugin.folo_logits_processors()]


class TestPlugin(PluginConformance):
    plugin = "folo-sampling"


class TestGreedy(SamplerConformance):
    plugin, name = "folo-sampling", "greedy"

    def params(self, part):
        return [SamplingParams(temperature=0)] * 5


class TestRandom(SamplerConformance):
    plugin, name = "folo-sampling", "random"

    def params(self, part):
        return [
            SamplingParams(),
            SamplingParams(top_k=5, seed=1),
            SamplingParams(top_p=0.8, temperature=1.5),
            SamplingParams(min_p=0.1, seed=-3),
            SamplingParams(top_k=9, top_p=0.9, min_p=0.02, temperature=0.7),
        ]


class ProcessorConformance(LogitsProcessorConformance):
    plugin = "folo-sampling"
    rows: ClassVar[list[SamplingParams]]

    def params(self):
        return self.rows


class TestPenalties(ProcessorConformance):
    name = "penalties"
    rows: ClassVar = [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(frequency_penalty=-0.5, repetition_penalty=0.8),
    ]


class TestBias(ProcessorConformance):
    name = "bias"
    rows: ClassVar = [SamplingParams(logit_bias={1: 5.0, 7: -3.0}), SamplingParams(logit_bias={0: 100.0})]


class TestMinTokens(ProcessorConformance):
    name = "min-tokens"
    rows: ClassVar = [
        SamplingParams(min_tokens=9, stop_token_ids=[3, 4]),
        SamplingParams(min_tokens=1, resolved_eos=(2,)),
    ]


class TestBadWords(ProcessorConformance):
    name = "bad-words"
    rows: ClassVar = [SamplingParams(resolved_bad_words=((4,), (1, 2))), SamplingParams(resolved_bad_words=((9,),))]


class TestAllowedTokens(ProcessorConformance):
    name = "allowed-tokens"
    rows: ClassVar = [SamplingParams(allowed_token_ids=[1, 2, 3]), SamplingParams(allowed_token_ids=[30])]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_part_is_in_the_readme_and_builds(spec):
    assert f"| `{spec.name}` |" in README
    arguments = [make_context(vocab_size=64)] if isinstance(spec, SamplerSpec) else [64, torch.device("cpu")]
    part = spec.factory(*arguments)
    assert (type(part).__doc__ or "").strip()


def test_stages_run_in_the_documented_order():
    stages = {spec.name: spec.stage for spec in plugin.folo_logits_processors()}
    assert stages == {"penalties": 200, "bias": 300, "min-tokens": 400, "bad-words": 600, "allowed-tokens": 800}
    assert sorted(stages, key=README.index) == list(stages)
