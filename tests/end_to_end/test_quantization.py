"""The demo model in 4 bits: its GGUF file holds 4 and 8 bits a weight, so rounding to them again changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import PROMPTS

from folo_core import LLM, SamplingParams
from folo_kernels.library import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason="Folo's CPU kernels were not compiled")

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def rounded() -> Any:
    return LLM("demo", quantization="int4", max_model_len=512, max_num_seqs=16, num_blocks=64)


def test_int4_keeps_every_weight(demo: Any, rounded: Any) -> None:
    pairs = zip(matrices(rounded), matrices(demo), strict=True)
    kept = [torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours.plain(), theirs.plain(), strict=True)]
    assert len(kept) == 30 * 7 + 1
    assert all(kept)


def matrices(llm: Any) -> Any:
    return llm.engine.components.executor.runner.model.matrices


def test_int4_gives_float32s_greedy_tokens(demo: Any, rounded: Any) -> None:
    prompts = PROMPTS[:6]
    ours, theirs = (
        [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] for llm in (rounded, demo)
    )
    assert ours == theirs
    assert len(set(map(tuple, ours))) == len(prompts), "the answers differ, so agreeing on them says something"


def test_it_takes_less_memory_than_float32(demo: Any, rounded: Any) -> None:
    plain, small = demo.engine.components.model_info, rounded.engine.components.model_info
    assert (small.quantization, small.dtype, small.num_parameters) == ("int4", "float32", plain.num_parameters)
    assert small.weight_bytes < plain.weight_bytes / 3
