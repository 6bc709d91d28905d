"""Draws shared by judging and drafting: the plain samplers', and one from any weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_core.sampling.interface import Distribution
from folo_core.sampling_params import SamplingType

if TYPE_CHECKING:
    from folo_core.sampling.interface import SamplerContext
    from folo_core.sampling.metadata import SamplingMetadata

DRAFTING, ACCEPTING, CORRECTING = (number << 40 for number in (1, 2, 3))
"""Added to the sequence index in the random key: a request's sequences never get so many, so each kind of draw has
random numbers of its own, independent of each other and of the plain sampler's."""


class PlainDraws:
    """The tokens that the engine's plain samplers would choose."""

    def __init__(self, context: SamplerContext) -> None:
        self._greedy = context.plain_sampler(SamplingType.GREEDY)
        self._random = context.plain_sampler(SamplingType.RANDOM)
        self.distribution = self._random if isinstance(self._random, Distribution) else None
        """States what a random draw follows; None if the plain sampler cannot."""

    def tokens(self, logits: torch.Tensor, metadata: SamplingMetadata, greedy: list[bool]) -> torch.Tensor:
        """Return one token for each row, int64 ``[rows]``; rows that are ``greedy`` get the most likely one."""
        if all(greedy) or not any(greedy):
            sampler = self._greedy if all(greedy) else self._random
            return sampler.step(logits, metadata).tokens[:, 0]
        tokens = torch.empty_like(metadata.positions)
        for sampler, wanted in ((self._greedy, True), (self._random, False)):
            rows = [row for row, is_greedy in enumerate(greedy) if is_greedy is wanted]
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = sampler.step(logits[index], metadata.select(rows)).tokens[:, 0]
        return tokens


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return an entry of each row, drawn in proportion to its weight, int64 ``[rows]``.

    Weights become whole numbers, so that their sums, and with them the entry, do not depend on the batch.

    Args:
        weights: float32 ``[rows, n]``, 0 at least, with one above 0 in each row.
        uniforms: float64 ``[rows]`` in [0, 1).
    """
    scale = 2.0 ** (52 - weights.shape[1].bit_length())
    running = weights.double().div_(weights.amax(1, keepdim=True)).mul_(scale).round_().cumsum(1)
    total = running[:, -1:]
    share = (uniforms[:, None] * total).floor_().minimum(total - 1)
    return torch.searchsorted(running, share, right=True).squeeze(1)
