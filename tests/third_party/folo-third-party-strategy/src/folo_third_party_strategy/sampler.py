"""Stochastic beam search.

W. Kool, H. van Hoof and M. Welling, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
Sequences Without Replacement", ICML 2019.
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


class StochasticBeamSampler:
    """A row's score is its perturbed log probability, its tag the bits of the plain one, a float64."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        """Remember the request: it says what has ended already."""
        self.requests[request.request_id] = request

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Perturb all continuations and keep each request's ``k`` greatest.

        Args:
            logits: float32 ``[rows, vocab]``.
            metadata: row for row with ``logits``.
        """
        plain = metadata.tags.view(torch.float64)[:, None] + logits.double().log_softmax(-1)
        perturbed = _condition(plain + _gumbel(metadata, logits.shape[1]), metadata.scores.double()[:, None])
        groups, device = metadata.groups, logits.device
        ks = [_k(metadata, rows) for _, rows in groups]
        each = min(max(ks), logits.shape[1])
        values, tokens = perturbed.topk(each)
        first = torch.tensor([rows.start for _, rows in groups], device=device)
        sizes = torch.tensor([len(rows) for _, rows in groups], device=device)
        owner = torch.arange(len(groups), device=device).repeat_interleave(sizes)
        table = values.new_full((len(groups), int(sizes.max()), each), -torch.inf)
        table[owner, torch.arange(len(logits), device=device) - first[owner]] = values
        scores, chosen = table.flatten(1).topk(min(max(ks), table[0].numel()))
        wanted = torch.tensor(self._places(groups, ks, scores[:, 0].tolist()), device=device)
        keep = (torch.arange(scores.shape[1], device=device) < wanted[:, None]) & scores.isfinite()
        parents = (first[:, None] + chosen // each)[keep]
        tokens = tokens[parents, (chosen % each)[keep]]
        tags = plain[parents, tokens].view(torch.int64)
        return SamplerOutput(parents=parents, tokens=tokens[:, None], scores=scores[keep].float(), tags=tags)

    def _places(self, groups: list[tuple[str, range]], ks: list[int], best: list[float]) -> list[int]:
        """How many rows go on: none once ``k`` ended texts are above all others, which only get lower."""
        return [
            0 if sum(ended.score >= top for ended in self.requests[name].finished) >= k else k
            for (name, _), k, top in zip(groups, ks, best, strict=True)
        ]

    def finish(self, request: Request) -> list[Sequence]:
        """Return the first ``n`` drawn: the order of perturbed log probabilities is that of the draws."""
        return sorted(request.finished, key=lambda sequence: -sequence.score)[: request.params.n]

    def remove_request(self, request_id: str) -> None:
        """Forget the request."""
        del self.requests[request_id]


def _condition(perturbed: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Shift each row's numbers, Gumbel distributed, so that their maximum is the given one (the paper's appendix B)."""
    below = perturbed - perturbed.amax(-1, keepdim=True)
    excess = maximum - perturbed + torch.log(-torch.expm1(below))
    return maximum - excess.clamp_min(0.0) - torch.log1p((-excess.abs()).exp())


def _gumbel(metadata: SamplingMetadata, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float64 ``[rows, vocab]``, keyed by request, sequence, position and token."""
    token = torch.arange(vocab_size, device=metadata.seeds.device)
    index = (metadata.sequence_indices[:, None] * vocab_size + token).flatten()
    seeds, positions = (column.repeat_interleave(vocab_size) for column in (metadata.seeds, metadata.positions))
    numbers = uniform(seeds, index, positions).view(-1, vocab_size)
    return -torch.log(-torch.log(numbers.clamp_min(2.0**-54)))


def _k(metadata: SamplingMetadata, rows: range) -> int:
    """The request's ``k``; rows of plain SamplingParams (under a borrowed sampler) draw one text."""
    return int(getattr(metadata.params[rows.start], "k", 1))
