"""Which tokens may be drawn: top-k, top-p and min-p, each as the smallest logit that it keeps.

All three filters keep the most likely tokens down to some logit, ties included, so a filter is one number per row
and filters combine by their maximum. No mask is stored, and no more is sorted than what surrounds a cut.
Every cut depends on its own row alone, bit for bit: maxima and selections are exact, and masses are whole numbers,
whose sums do not depend on the order of addition (sums of fractions would: on the device and on the batch).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.sampling.metadata import SamplingMetadata

SHORT_TOP_K = 1024
"""Up to this ``top_k`` the kept tokens are found among the blocks with the largest maxima."""
_BLOCK = 32
_BUCKETS = 4096
_MASS_BITS = 42
"""A mass is a weight in units of 2**-42 of the largest one: a million of them fit an int64."""


@attrs.frozen(slots=True)
class Filters:
    """The filters of some rows. Tensors are float64 ``[rows, 1]``."""

    temperature: torch.Tensor
    """Above 0: a temperature of 0 has become the smallest float."""
    top_k: list[int]
    """On the host, as it decides which work is done; 0 when off."""
    top_p: torch.Tensor
    """1 when off."""
    min_p: torch.Tensor
    """0 when off."""
    some_min_p: bool
    """Whether some row of the batch has ``min_p`` on."""

    @property
    def need_cut(self) -> bool:
        """Whether top-k or min-p may drop a token."""
        return self.some_min_p or any(self.top_k)

    @classmethod
    def of(cls, metadata: SamplingMetadata, vocab_size: int) -> Filters:
        """Return the filters of all rows of a batch."""
        smallest = torch.finfo(torch.float64).tiny
        return cls(
            temperature=metadata.temperature.double().clamp_(min=smallest)[:, None],
            top_k=[params.top_k if 0 < params.top_k < vocab_size else 0 for params in metadata.params],
            top_p=metadata.top_p.double()[:, None],
            min_p=metadata.min_p.double()[:, None],
            some_min_p=metadata.any_min_p,
        )

    def rows(self, rows: Sequence[int], index: torch.Tensor | slice) -> Filters:
        """Return the filters of ``rows``, which ``index`` names in the form that tensors want."""
        top_k = [self.top_k[row] for row in rows]
        return Filters(self.temperature[index], top_k, self.top_p[index], self.min_p[index], self.some_min_p)


def weigh(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return each row's probabilities at ``temperature`` relative to its largest one, float64 ``[rows, n]``.

    The maximum is subtracted first: a logit over a tiny temperature would overflow, a difference becomes -inf.
    """
    return logits.double().sub_(logits.amax(1, keepdim=True)).mul_(temperature.reciprocal()).exp_()


def whole_(weights: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Round weights in [0, 1] to whole numbers, in place; over a vocabulary they add up to less than 2**53, exactly."""
    return weights.mul_(2.0 ** (52 - vocab_size.bit_length())).round_()


def narrow_(
    logits: torch.Tensor, weights: torch.Tensor, cut: torch.Tensor, filters: Filters, *, nucleus: bool
) -> torch.Tensor:
    """Zero the weights of tokens below ``cut`` and, of the others, of those that top-p and then min-p drop.

    Args:
        logits: float32 ``[rows, n]``: whole rows, or as much of each as reaches ``cut``.
        weights: ``weigh`` of ``logits``; changed in place.
        cut: float32 ``[rows, 1]``: the smallest logit that top-k keeps.
        filters: the rows' filters.
        nucleus: False if no row limits top-p, which spares the work.

    Returns:
        The smallest logit that is kept, float32 ``[rows, 1]``; -inf where no filter is on.
    """
    if nucleus:
        _zero_below_(weights, logits, cut)
        cut = torch.where(filters.top_p < 1, top_p_cut(logits, weights, filters), cut)
    cut = torch.maximum(cut, min_p_cut(logits.amax(1, keepdim=True), filters))
    _zero_below_(weights, logits, cut)
    return cut


def _zero_below_(weights: torch.Tensor, logits: torch.Tensor, cut: torch.Tensor) -> None:
    # Comparing into floats and multiplying is ten times faster on a CPU than a boolean mask.
    weights.mul_(torch.ge(logits, cut, out=torch.empty_like(logits)))


def top_k_cut(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Return each row's ``top_k``-th largest logit, ``[rows, 1]``, or -inf where ``top_k`` is 0.

    Tokens tied with it are kept, too, so more than ``top_k`` may pass.
    """
    cut = logits.new_full((len(logits), 1), -math.inf)
    longest = max(top_k)
    if 0 < longest <= SHORT_TOP_K:
        values, _ = largest(logits, longest)
        ranks = torch.tensor(top_k, device=logits.device)[:, None]
        return torch.where(ranks > 0, values.gather(1, (ranks - 1).clamp_(min=0)), cut)
    for k in {*top_k} - {0}:
        rows = torch.tensor([row for row, other in enumerate(top_k) if other == k], device=logits.device)
        cut[rows] = logits[rows].kthvalue(logits.shape[1] - k + 1, dim=1, keepdim=True).values
    return cut


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``count`` largest logits of each row, descending, and their token ids; as ``torch.topk``, but faster.

    The ``count`` blocks with the largest maxima hold them: each has an entry that reaches the least of those
    maxima, and an entry above that makes its own block one of them.
    """
    vocab_size = logits.shape[1]
    whole = vocab_size // _BLOCK * _BLOCK
    if count * _BLOCK * 2 > vocab_size:
        values, ids = logits.topk(count, 1)
        return values, ids
    blocks = logits[:, :whole].view(len(logits), whole // _BLOCK, _BLOCK).amax(2).topk(count, 1).indices
    ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    if whole < vocab_size:
        tail = torch.arange(whole, vocab_size, device=logits.device).expand(len(logits), -1)
        ids = torch.cat((ids, tail), 1)
    values, places = logits.gather(1, ids).topk(count, 1)
    return values, ids.gather(1, places)


def min_p_cut(maxima: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return the smallest float32 logit whose probability is ``min_p`` times the largest one's, ``[rows, 1]``.

    The logarithm of a ratio of probabilities is the difference of the logits over the temperature.
    """
    exact = maxima.double() + filters.temperature * filters.min_p.log()
    cut = exact.float()
    return torch.where(cut.double() < exact, torch.nextafter(cut, torch.full_like(cut, math.inf)), cut)


def top_p_cut(logits: torch.Tensor, weights: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return the logit at which the mass of the most likely tokens reaches ``top_p``, float32 ``[rows, 1]``.

    The kept tokens are the smallest set of most likely ones whose probabilities add up to ``top_p`` at least,
    and all tokens tied with the last (nucleus sampling of Holtzman et al., ICLR 2020, with ties).

    Args:
        logits: float32 ``[rows, n]``.
        weights: ``weigh`` of ``logits``, 0 for tokens that an earlier filter dropped.
        filters: the rows' filters.
    """
    masses = weights.mul(2.0**_MASS_BITS).round_().long()
    total = masses.sum(1, keepdim=True)
    needed = (filters.top_p * total.double()).ceil_().long().clamp_(min=1).minimum(total)
    if logits.device.type != "cpu" or logits.shape[1] <= _BUCKETS:
        return _reach(logits, masses, needed)
    return _reach(*_last_bucket(logits, masses, needed, filters.temperature))


def _reach(logits: torch.Tensor, masses: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """Return the logit at which the masses in descending order of logits add up to ``needed``, ``[rows, 1]``."""
    values, order = logits.sort(dim=1, descending=True)
    place = torch.searchsorted(masses.gather(1, order).cumsum(1), needed)
    return values.gather(1, place.clamp_(max=logits.shape[1] - 1))


def _last_bucket(
    logits: torch.Tensor, masses: torch.Tensor, needed: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Narrow the search for the cut to the few tokens of one bucket: a radix select in place of a sort.

    Buckets are even steps down from the largest logit to where masses are 0. A bucket's index falls with the
    logit, so equal logits share a bucket, and all before the one where the mass reaches ``needed`` are kept.

    Returns:
        The arguments of ``_reach`` for that bucket: its logits and masses, padded to ``[rows, longest]`` with -inf
        and 0, and what is needed after all earlier buckets.
    """
    top = logits.amax(1, keepdim=True)
    depth = (temperature * ((_MASS_BITS + 1) * math.log(2))).float()
    step = torch.minimum(top - logits.amin(1, keepdim=True), depth).clamp_(min=1e-30) / (_BUCKETS - 1)
    # The second clamp is for rows that hold NaN: they get nonsense, but must not stop their neighbours.
    bucket = (top - logits).div_(step).clamp_(max=_BUCKETS - 1).long().clamp_(min=0)
    histogram = masses.new_zeros(len(logits), _BUCKETS).scatter_add_(1, bucket, masses)
    running = histogram.cumsum(1)
    last = torch.searchsorted(running, needed).clamp_(max=_BUCKETS - 1)
    rows, columns = (bucket == last).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(logits))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(logits), int(counts.max()))
    values = logits.new_full(shape, -math.inf).index_put_((rows, places), logits[rows, columns])
    inside = masses.new_zeros(shape).index_put_((rows, places), masses[rows, columns])
    return values, inside, needed - (running - histogram).gather(1, last)
