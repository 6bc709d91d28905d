"""Times calls on a CUDA device inside CUDA graphs, over more weights than the caches hold; shapes of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEVICE, DTYPE = "cuda", torch.bfloat16
COLD_BYTES = 400 * 2**20
"""Weights that a graph reads: several times what the caches of any device hold."""
MOST_COPIES = 64


@attrs.frozen(kw_only=True)
class Shape:
    """A model's sizes."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    intermediate: int
    head_norms: bool

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each product."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.size, self.hidden),
            "out": (self.hidden, self.heads * self.size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


MODELS = {
    "A": Shape(
        vocab=151936, hidden=1024, layers=28, heads=16, kv_heads=8, size=128, intermediate=3072, head_norms=True
    ),
    "B": Shape(
        vocab=128256, hidden=4096, layers=32, heads=32, kv_heads=8, size=128, intermediate=14336, head_norms=False
    ),
}


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Numbers that keep activations of order one."""
    made = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return made.mul_(shape[-1] ** -0.5)


def ones(size: int) -> torch.Tensor:
    """A norm's factor."""
    return torch.ones(size, device=DEVICE)


def microseconds(calls: Sequence[Callable[[], object]], turns: int) -> float:
    """How long each of the calls takes, one after another in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best * 1000 / len(calls)


def weights_of(outputs: int, inputs: int) -> list[torch.Tensor]:
    """As many of them as it takes to find none in the caches."""
    copies = max(2, min(MOST_COPIES, COLD_BYTES // (2 * outputs * inputs)))
    return [random(outputs, inputs) for _ in range(copies)]
