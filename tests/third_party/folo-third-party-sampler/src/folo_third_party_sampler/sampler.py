"""Locally typical sampling.

C. Meister, T. Pimentel, G. Wiher and R. Cotterell, "Locally Typical Sampling", Transactions of the ACL 11, 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.rng import uniform

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence


def typical_mask(probs: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Which tokens to keep: the smallest set nearest to the expected surprise that holds the mass; ties stay together.

    Args:
        probs: float ``[rows, vocab]``, each row summing to 1.
        mass: float ``[rows]`` in (0, 1].

    Returns:
        bool ``[rows, vocab]``; every row keeps at least one token, and never one of probability 0.
    """
    surprise = -probs.log()
    entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(-1, keepdim=True)
    distance = torch.where(probs > 0, (surprise - entropy).abs(), torch.inf)
    ordered, order = distance.sort(dim=-1, stable=True)
    reached = probs.gather(-1, order).cumsum(-1)
    last = (reached < mass[:, None]).sum(-1, keepdim=True).clamp_max(probs.shape[-1] - 1)
    return (distance <= ordered.gather(-1, last)) & (probs > 0)


class TypicalSampler:
    """One token per row, drawn from the typical ones after temperature. Keeps no state between steps."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device

    def add_request(self, request: Request) -> None:
        """Nothing to open: every row carries all that a step needs."""

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Sample all rows in one go; a temperature of 0 takes the most likely token.

        Args:
            logits: float32 ``[rows, vocab]``.
            metadata: row for row with ``logits``.
        """
        greedy = metadata.temperature == 0
        probs = (logits / torch.where(greedy, 1.0, metadata.temperature)[:, None]).double().softmax(-1)
        mass = torch.tensor([_typical_p(params) for params in metadata.params], device=logits.device)
        kept = torch.where(typical_mask(probs, mass.double()), probs, 0.0)
        best = torch.zeros_like(probs).scatter(-1, probs.argmax(-1, keepdim=True), 1.0)
        kept = torch.where(greedy[:, None], best, kept)
        cumulative = kept.cumsum(-1)
        total = cumulative[:, -1]
        drawn = uniform(metadata.seeds, metadata.sequence_indices, metadata.positions) * total
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, drawn[:, None], right=True)
        logprobs = (kept.gather(-1, tokens) / total[:, None]).log().clamp_max(0.0).float()
        return SamplerOutput(parents=torch.arange(len(tokens), device=logits.device), tokens=tokens, logprobs=logprobs)

    def finish(self, request: Request) -> list[Sequence]:
        """Return the answers in the order in which they ended."""
        return list(request.finished)

    def remove_request(self, request_id: str) -> None:
        """Nothing to drop."""


def _typical_p(params: object) -> float:
    """The row's mass; rows of plain SamplingParams (under a borrowed sampler) keep everything."""
    return float(getattr(params, "typical_p", 1.0))
