"""After the fan-out a step whose candidates are all kept asks the device nothing, so an engine may run ahead."""

from __future__ import annotations

import attrs
import pytest
import torch

from folo_best_of import BestOfParams
from folo_best_of.sampler import BestOfSampler
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingParams
from folo_core.testing.builders import make_metadata, make_request


class FirstTokens:
    """Draws token 0 for each row, without a question."""

    reads_any_dtype = True

    def __init__(self, steady: int | None = 0) -> None:
        self.steady = steady

    def steady_after(self, params):
        return self.steady

    def add_request(self, request): ...

    def step(self, logits, metadata):
        return SamplerOutput(parents=torch.arange(len(logits)), tokens=torch.zeros(len(logits), 1, dtype=torch.int64))

    def log_probs_of(self, logits, tokens):
        return logits.log_softmax(1).gather(1, tokens)


@pytest.mark.parametrize(
    ("params", "steady"),
    [
        (SamplingParams(n=3), 1),
        (SamplingParams(n=2, best_of=3), None),
        (BestOfParams(n=2, best_of=3), None),
        (BestOfParams(n=2, best_of=3, early_stop=False), 1),
        (BestOfParams(n=3), 1),
    ],
)
def test_what_is_promised(params, steady):
    assert BestOfSampler(FirstTokens()).steady_after(params) == steady
    assert BestOfSampler(FirstTokens(steady=None)).steady_after(params) is None
    assert BestOfSampler(FirstTokens()).reads_any_dtype


def test_the_promise_is_kept_also_when_one_candidate_is_left(monkeypatch):
    params = BestOfParams(n=1, best_of=3, early_stop=False)
    sampler = BestOfSampler(FirstTokens())
    sampler.add_request(make_request("a", params))
    first = make_metadata([params], vocab_size=5, request_ids=["a"])
    output = sampler.step(torch.randn(1, 5), first)
    assert output.parents.tolist() == [0, 0, 0]
    later = make_metadata([params], vocab_size=5, request_ids=["a"])
    later = attrs.evolve(later, scores=output.scores[:1], tags=output.tags[:1])

    def refuse(*_args):
        raise AssertionError("the step waits for the device")

    for name in ("tolist", "item", "cpu", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    output = sampler.step(torch.randn(1, 5), later)
    monkeypatch.undo()
    assert output.parents.tolist() == [0]
    assert output.scores.item() == pytest.approx(later.scores.item() + output.logprobs.item())
