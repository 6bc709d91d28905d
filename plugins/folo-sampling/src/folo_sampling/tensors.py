"""Random draws in tensor operations, on any device: each row's distribution is inverted at a number of its own.

Rows are grouped by the work they need, for speed alone: every way leads to the same token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_core.sampling.rng import uniform
from folo_sampling.masks import SHORT_TOP_K, Filters, largest, narrow_, top_k_cut, weigh, whole_

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata

_BLOCK = 128
_SHORT_ROW = 2048
_SPARE = 16
"""Candidates taken beyond the largest top-k, so that tokens tied with the last one fit in."""
_HOST_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 25
"""Logits worked on at a time: what a processor's cache holds; a bound on the memory taken of a device."""


class TensorDraws:
    """Draws tokens of rows of float32 logits ``[rows, vocab_size]`` that live on ``device``."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        # Whether a short list held all ties is known on the device only, and asking would wait for the device.
        self._short_top_k = SHORT_TOP_K if device.type == "cpu" else 0
        self._chunk = max(1, (_HOST_CHUNK if device.type == "cpu" else _DEVICE_CHUNK) // vocab_size)

    def tokens(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return a token for each row, int64 ``[rows]``."""
        filters = Filters.of(metadata, self._vocab_size)
        uniforms = uniform(metadata.seeds, metadata.sequence_indices, metadata.positions)[:, None]
        tokens = torch.empty_like(metadata.positions)
        short, nucleus, plain = self._groups(metadata, filters.top_k)
        if short:
            cut_off = self._draw_short(logits, filters, uniforms, tokens, short)
            nucleus = sorted(nucleus + cut_off)
        for group in (nucleus, plain):
            for start in range(0, len(group), self._chunk):
                rows = group[start : start + self._chunk]
                index = _index(rows, logits.device)
                part = filters.rows(rows, index)
                tokens[index] = _draw_whole(logits[index], part, uniforms[index], nucleus=group is nucleus)
        return tokens

    def probabilities(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return the distribution that ``tokens`` draws each row's token from, float32 ``[rows, vocab_size]``."""
        filters = Filters.of(metadata, self._vocab_size)
        found = torch.empty_like(logits)
        for start in range(0, len(logits), self._chunk):
            rows = range(start, min(start + self._chunk, len(logits)))
            index = slice(rows.start, rows.stop)
            weights = whole_(_weights(logits[index], filters.rows(rows, index), nucleus=True), self._vocab_size)
            found[index] = weights.div_(weights.sum(1, keepdim=True))
        return found

    def _groups(self, metadata: SamplingMetadata, top_k: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Return the rows with a short top-k, those of the others that limit top-p, and the rest."""
        short: list[int] = []
        nucleus: list[int] = []
        plain: list[int] = []
        for row, params in enumerate(metadata.params):
            group = short if 0 < top_k[row] <= self._short_top_k else nucleus if params.top_p < 1 else plain
            group.append(row)
        return short, nucleus, plain

    def _draw_short(
        self, logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor, tokens: torch.Tensor, rows: list[int]
    ) -> list[int]:
        """Draw ``rows`` from their largest logits; return those whose ties were cut off, to be drawn again."""
        index = _index(rows, logits.device)
        part = filters.rows(rows, index)
        count = min(self._vocab_size, max(part.top_k) + _SPARE)
        values, ids = largest(logits[index], count)
        cut = values.gather(1, torch.tensor(part.top_k)[:, None] - 1)
        complete = (values[:, -1:] < cut).squeeze(1).tolist() if count < self._vocab_size else [True] * len(rows)
        ids, order = ids.sort(1)  # whole rows are drawn from in this order
        values = values.gather(1, order)
        weights = weigh(values, part.temperature)
        narrow_(values, weights, cut, part, nucleus=True)
        tokens[index] = ids.gather(1, draw(weights, uniforms[index], self._vocab_size)[:, None]).squeeze(1)
        return [row for row, whole in zip(rows, complete, strict=True) if not whole]


def _index(rows: list[int], device: torch.device) -> torch.Tensor | slice:
    """Return what indexes ascending ``rows``: a slice, which copies nothing, if they are adjacent."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _draw_whole(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor, *, nucleus: bool) -> torch.Tensor:
    """Return a token drawn from each whole row, int64 ``[rows]``."""
    return draw(_weights(logits, filters, nucleus=nucleus), uniforms, logits.shape[1])


def _weights(logits: torch.Tensor, filters: Filters, *, nucleus: bool) -> torch.Tensor:
    """Return each token's probability relative to its row's largest one, float64 ``[rows, vocab_size]``."""
    weights = weigh(logits, filters.temperature)
    narrow_(logits, weights, top_k_cut(logits, filters.top_k), filters, nucleus=nucleus)
    return weights


def draw(weights: torch.Tensor, uniforms: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the entry at which the running weight of each row passes its share of the total, int64 ``[rows]``.

    Weights become whole numbers, whose sums are the same in any order. An entry of weight 0 is never drawn.

    Args:
        weights: float64 ``[rows, n]`` in [0, 1], some of them 1; changed in place.
        uniforms: float64 ``[rows, 1]`` in [0, 1).
        vocab_size: sets the unit of the weights, so that part of a row is weighed like the whole row.
    """
    whole_(weights, vocab_size)
    length = weights.shape[1]
    block = length if length <= _SHORT_ROW else _BLOCK
    if length % block:
        weights = torch.nn.functional.pad(weights, (0, -length % block))
    blocks = weights.view(len(weights), -1, block)
    sums = blocks.sum(2)
    running = sums.cumsum(1)
    total = running[:, -1:]
    share = (uniforms * total).floor_().minimum(total - 1)
    index = torch.searchsorted(running, share, right=True).clamp_(max=running.shape[1] - 1)
    inside = blocks.take_along_dim(index[:, :, None], 1).squeeze(1).cumsum(1)
    place = torch.searchsorted(inside, share - (running - sums).gather(1, index), right=True)
    return (index * block + place).squeeze(1).clamp_(max=length - 1)
