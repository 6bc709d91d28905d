"""A step costs no more than it did: in calls, lines, operators and bytes, which no busy machine changes.

``python bench/cost_bar.py`` prints the counts; with ``--write`` it sets the bars anew.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import transformers

import step_costs
from folo_core.engine.output_processor import OutputProcessor
from folo_core.execution import input_batch
from folo_core.execution.input_batch import InputBatch
from folo_core.execution.sampling_stage import SamplingStage
from folo_kernels.library import why_not

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "folo-hf" / "tests"))

from tiny_models import SMALL, save_model


def judge(part: str, costs: step_costs.Costs) -> None:
    allowed = step_costs.read_bar(part)
    assert costs.keys() == allowed.keys()
    for loose in step_costs.too_loose(costs, allowed):
        warnings.warn(f"{part}: {loose}", stacklevel=2)
    assert not step_costs.too_dear(costs, allowed)


@pytest.mark.slow
def test_the_engine_costs_no_more_than_allowed() -> None:
    judge("engine", step_costs.engine_costs())


@pytest.mark.parametrize("part", ["forward", "forward_torch"])
def test_the_forward_asks_no_more_of_torch_than_allowed(part: str, tmp_path: Path) -> None:
    native = part == "forward"
    if native and why_not() is not None:
        pytest.skip(f"no native kernels: {why_not()}")
    save_model(tmp_path / "llama", transformers.LlamaConfig(**SMALL))
    judge(part, step_costs.forward_costs(tmp_path / "llama", native=native))


def test_the_same_step_costs_the_same_again() -> None:
    first, again = (step_costs.measure(step_costs._fake_engine, "decode_8", forward=False)[0] for _ in range(2))
    exact = [name for name in first if name != "python_peak_bytes"]
    assert len(exact) >= 5
    assert [first[name] for name in exact] == [again[name] for name in exact]


def folo_code(source: str) -> dict:
    """Run source as if it stood in the engine's own files, so that it is counted as theirs."""
    names: dict = {}
    exec(compile(source, input_batch.__file__, "exec"), names)  # noqa: S102
    return names


LOOP = """
def pack(batch, scheduled):
    total = 0
    for tokens in scheduled.num_new_tokens:
        once = tokens + 1
        total += once
        total -= 1
    return original(batch, scheduled)
"""

HELPER = """
def append_token(processor, request, sequence, token, logprob=None):
    return original(processor, request, sequence, token, logprob)
"""

BUILTIN = """
def pack(batch, scheduled):
    [min(tokens, 1) for tokens in scheduled.num_new_tokens]
    return original(batch, scheduled)
"""

OPERATOR = """
def run(stage, logits, sampled, result):
    for row in range(len(sampled)):
        logits[row] = logits[row] * 1.0
    return original(stage, logits, sampled, result)
"""

BYTES = """
def pack(batch, scheduled):
    copies = [batch.token_ids.copy() for _ in scheduled.seq_ids]
    return original(batch, scheduled)
"""


@pytest.mark.parametrize(
    ("owner", "method", "source", "noticed"),
    [
        (InputBatch, "pack", LOOP, "python_lines"),
        (OutputProcessor, "append_token", HELPER, "python_calls"),
        (InputBatch, "pack", BUILTIN, "builtin_calls"),
        (SamplingStage, "run", OPERATOR, "torch_operators"),
        (SamplingStage, "run", OPERATOR, "torch_bytes"),
        (InputBatch, "pack", BYTES, "python_peak_bytes"),
    ],
)
def test_a_step_that_became_dearer_row_by_row_is_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, source: str, noticed: str
) -> None:
    names = folo_code(source)
    names["original"] = getattr(owner, method)
    monkeypatch.setattr(owner, method, names[method])
    costs = {"decode_32": step_costs.measure(step_costs._fake_engine, "decode_32", forward=False)[0]}
    found = step_costs.too_dear(costs, step_costs.read_bar("engine"))
    assert any(f"decode_32: {noticed}:" in line for line in found)


def test_a_bar_that_is_far_too_high_asks_to_be_tightened_and_a_missing_one_is_none() -> None:
    costs = {"decode_1": {"python_lines": 100.0}}
    (loose,) = step_costs.too_loose(costs, {"decode_1": {"python_lines": 200.0}})
    assert "tighten me" in loose
    assert step_costs.too_loose(costs, {"decode_1": {"python_lines": 103.0}}) == []
    assert step_costs.too_dear(costs, {"decode_1": {"python_lines": 103.0}}) == []
    assert len(step_costs.too_dear(costs, {})) == 1
