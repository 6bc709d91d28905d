"""On a CUDA device every strategy finds what it finds on the CPU, with models in float32 and the same seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import ARCHITECTURES, save_model

from folo_beam import BeamParams
from folo_best_of import BestOfParams
from folo_core import LLM, SamplingParams
from folo_guidance import GuidanceParams
from folo_speculative import SpeculativeParams
from folo_tree_search import TreeSearchParams

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (nox -s gpu)"),
]

PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13], [40, 41, 40, 41, 40], list(range(10, 40)), [3, 3, 3, 3]]
SHARED: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True}
CASES: dict[str, SamplingParams] = {
    "beam": BeamParams(width=4, num_return_sequences=3, **SHARED),
    "diverse beam": BeamParams(width=4, num_groups=2, diversity_penalty=0.5, **SHARED),
    "constrained beam": BeamParams(width=4, must_include=[[7, 8]], **SHARED),
    "best of": SamplingParams(n=2, best_of=5, seed=3, **SHARED),
    "normalised best of": BestOfParams(n=2, best_of=5, seed=3, length_penalty=1.0, **SHARED),
    "speculative greedy": SpeculativeParams(temperature=0, **SHARED),
    "speculative random": SpeculativeParams(seed=3, temperature=0.7, top_p=0.9, **SHARED),
    "tree search": TreeSearchParams(seed=3, **SHARED),
    "guidance": GuidanceParams(scale=2.0, temperature=0, **SHARED),
}


def answers(folder: Path, guide: Path, device: str, params: SamplingParams) -> list[list[list[int]]]:
    llm = LLM(
        str(folder), device=device, dtype="float32", skip_tokenizer_init=True, num_blocks=80, block_size=8,
        max_model_len=64, max_num_seqs=16, plugins={"folo-guidance": {"guide": str(guide)}},
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, params)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert llm.engine.components.model_info.device.startswith(device)
    llm.engine.check_integrity()
    assert llm.engine.state.kv.pool.num_free == llm.engine.state.kv.pool.num_usable
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("case", CASES)
def test_a_strategy_finds_what_it_finds_on_the_cpu(case: str, tmp_path: Path) -> None:
    for name, architecture in (("model", "llama"), ("guide", "qwen3")):
        save_model(tmp_path / name, ARCHITECTURES[architecture]())
    there, here = (answers(tmp_path / "model", tmp_path / "guide", device, CASES[case]) for device in ("cuda", "cpu"))
    same = sum(a == b for a, b in zip(there, here, strict=True))
    assert same >= len(PROMPTS) - 1, "logits differ in their last bits between devices, and rarely a token with them"


def test_speculation_changes_no_token_on_the_device(tmp_path: Path) -> None:
    save_model(tmp_path / "model", ARCHITECTURES["llama"]())
    arguments = tmp_path / "model", tmp_path / "model", "cuda"
    plain = answers(*arguments, SamplingParams(temperature=0, **SHARED))
    drafted = answers(*arguments, SpeculativeParams(temperature=0, **SHARED))
    assert sum(a == b for a, b in zip(plain, drafted, strict=True)) >= len(PROMPTS) - 1
